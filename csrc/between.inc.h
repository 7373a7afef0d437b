// What tokens go through between linear layers: a norm, and the gate of a perceptron, each read once and written once.
// Rounded where the modules round. Included by body.inc.h.

typedef uint32_t Bits __attribute__((vector_size(4 * W)));

static inline INLINE Bits bits_of(F v) {
  Bits bits;
  __builtin_memcpy(&bits, &v, sizeof(bits));
  return bits;
}

static inline INLINE F with_bits(Bits bits) {
  F v;
  __builtin_memcpy(&v, &bits, sizeof(v));
  return v;
}

// BOTH floats of memory and two vectors, in an order of the type's own: what is computed value by value is written in
// the order in which it was read. rounded: the nearest that memory holds.
constexpr int64_t BOTH = 2 * W;

struct Float32 {
  using Stored = float;
  static inline INLINE void read(const float* p, F* v) { v[0] = load(p), v[1] = load(p + W); }
  static inline INLINE void write(float* p, const F* v) { store(p, v[0]), store(p + W, v[1]); }
  static inline F rounded(F v) { return v; }
};

struct Float16 {
  using Stored = uint16_t;
  static inline INLINE void read(const uint16_t* p, F* v) { v[0] = load_f16(p), v[1] = load_f16(p + W); }
  static inline INLINE void write(uint16_t* p, const F* v) { store_f16(p, v[0]), store_f16(p + W, v[1]); }
  static inline INLINE F rounded(F v) {
    uint16_t stored[W];
    store_f16(stored, v);
    return load_f16(stored);
  }
};

// Two neighbours are a word: the first of each and the second of each. NaNs that were bfloat16 stay NaNs.
struct Bfloat16 {
  using Stored = uint16_t;
  static constexpr uint32_t SECOND = 0xffff0000;
  static inline INLINE void read(const uint16_t* p, F* v) {
    Bits words;
    __builtin_memcpy(&words, p, sizeof(words));
    v[0] = with_bits(words << 16), v[1] = with_bits(words & SECOND);
  }
  static inline INLINE void write(uint16_t* p, const F* v) {
    Bits words = nearest(v[0]) >> 16 | nearest(v[1]);
    __builtin_memcpy(p, &words, sizeof(words));
  }
  static inline INLINE F rounded(F v) { return with_bits(nearest(v)); }
  static inline INLINE Bits nearest(F v) {
    Bits bits = bits_of(v);
    return (bits + 0x7fff + (bits >> 16 & 1)) & SECOND;
  }
};

// One after the other, as they are beside another type's. Any NaN stays one.
struct Bfloat16InOrder {
  using Stored = uint16_t;
  static inline INLINE void read(const uint16_t* p, F* v) { v[0] = load_bf16(p), v[1] = load_bf16(p + W); }
  static inline INLINE void write(uint16_t* p, const F* v) { store_bf16(p, v[0]), store_bf16(p + W, v[1]); }
  static inline F rounded(F v) { return Bfloat16::rounded(v); }
};

template <class OfBfloat16, class Do>
static inline void with_type(int32_t dtype, Do&& run) {
  dtype == ZP_F32 ? run(Float32()) : dtype == ZP_F16 ? run(Float16()) : run(OfBfloat16());
}

// BOTH values from i on, zeros behind the end.
template <class T>
static inline INLINE void read_at(const typename T::Stored* p, int64_t i, int64_t end, F* v) {
  if (i + BOTH <= end) return T::read(p + i, v);
  typename T::Stored rest[BOTH] = {};
  __builtin_memcpy(rest, p + i, (end - i) * sizeof(*rest));
  T::read(rest, v);
}

template <class T>
static inline INLINE void write_at(typename T::Stored* p, int64_t i, int64_t end, const F* v) {
  if (i + BOTH <= end) return T::write(p + i, v);
  typename T::Stored rest[BOTH];
  T::write(rest, v);
  __builtin_memcpy(p + i, rest, (end - i) * sizeof(*rest));
}

// --- a norm ---

template <class T, class WEIGHT>
static void normalize_row(const zp_norm& n, int64_t row) {
  int64_t k = n.columns;
  const auto* x = (const typename T::Stored*)n.x + row * k;
  const auto* weight = (const typename WEIGHT::Stored*)n.weight;
  auto* y = (typename T::Stored*)n.y + row * k;
  F squares[4] = {zero(), zero(), zero(), zero()};
  auto add_squares = [&](int64_t i, F* sums) INLINE {
    F v[2];
    read_at<T>(x, i, k, v);
    unroll<2>([&](auto s) INLINE { sums[s] = fma(v[s], v[s], sums[s]); });
  };
  int64_t i = 0;
  for (; i + 2 * BOTH <= k; i += 2 * BOTH) add_squares(i, squares), add_squares(i + BOTH, squares + 2);
  for (; i < k; i += BOTH) add_squares(i, squares);
  float mean = sum(add(add(squares[0], squares[1]), add(squares[2], squares[3]))) / (float)k;
  F factor = set1(1.0f / __builtin_sqrtf(mean + n.eps)), shift = set1(n.shift);
  for (i = 0; i < k; i += BOTH) {
    F v[2], w[2];
    read_at<T>(x, i, k, v), read_at<WEIGHT>(weight, i, k, w);
    unroll<2>([&](auto s) INLINE {
      F normal = mul(v[s], factor);
      v[s] = mul(n.rounds_first ? T::rounded(normal) : normal, add(w[s], shift));
    });
    write_at<T>(y, i, k, v);
  }
}

static void normalize(const zp_norm& n, int64_t row0, int64_t row1) {
  auto rows = [&](auto t, auto w) {
    for (int64_t row = row0; row < row1; row++) normalize_row<decltype(t), decltype(w)>(n, row);
  };
  if (n.dtype == n.weight_dtype) return with_type<Bfloat16>(n.dtype, [&](auto t) { rows(t, t); });
  with_type<Bfloat16InOrder>(n.dtype,
                             [&](auto t) { with_type<Bfloat16InOrder>(n.weight_dtype, [&](auto w) { rows(t, w); }); });
}

// --- a gate ---

// e^v, to 2 units in the last place; infinity from 88.4 on, 2^-126 below -87.3.
static inline INLINE F exponential(F v) {
  constexpr float LOG2_E = 0x1.715476p0f, LN2_HIGH = 0x1.62e4p-1f, LN2_LOW = 0x1.7f7d1cp-20f;
  constexpr float SHIFT = 0x1.8p23f + 127;  // brings an integer, and the exponent's bias, to the lowest bits
  v = min(set1(89), max(set1(-87.3f), v));  // a NaN stays
  F shifted = fma(v, set1(LOG2_E), set1(SHIFT)), n = sub(shifted, set1(SHIFT));
  F r = fma(n, set1(-LN2_LOW), fma(n, set1(-LN2_HIGH), v));
  constexpr float TAYLOR[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  F p = set1(1.0f / 720);
  for (float c : TAYLOR) p = fma(p, r, set1(c));
  return mul(p, with_bits(bits_of(shifted) << 23));
}

// x / (1 + e^-s): of SiLU s is x, of GELU by tanh 2 sqrt(2 / pi) (x + 0.044715 x^3).
template <int ACTIVATION>
static inline INLINE F activation(F x) {
  F minus_s = sub(zero(), x);
  if constexpr (ACTIVATION == ZP_GELU_TANH) {
    constexpr float LINE = -1.5957691216f, CUBE = LINE * 0.044715f;
    minus_s = mul(x, fma(mul(x, x), set1(CUBE), set1(LINE)));
  }
  return div(x, add(set1(1), exponential(minus_s)));
}

template <class T, int ACTIVATION>
static void gate_values(const zp_gate& g, int64_t begin, int64_t end) {
  const auto* gate = (const typename T::Stored*)g.gate;
  const auto* up = (const typename T::Stored*)g.up;
  auto* y = (typename T::Stored*)g.y;
  for (int64_t i = begin; i < end; i += BOTH) {
    F v[2], factor[2];
    read_at<T>(gate, i, end, v), read_at<T>(up, i, end, factor);
    unroll<2>([&](auto s) INLINE { v[s] = mul(T::rounded(activation<ACTIVATION>(v[s])), factor[s]); });
    write_at<T>(y, i, end, v);
  }
}

static void gate(const zp_gate& g, int64_t begin, int64_t end) {
  with_type<Bfloat16>(g.dtype, [&](auto t) {
    g.activation == ZP_SILU ? gate_values<decltype(t), ZP_SILU>(g, begin, end)
                            : gate_values<decltype(t), ZP_GELU_TANH>(g, begin, end);
  });
}
