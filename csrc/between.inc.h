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

// Floats of memory and F. rounded: the nearest that memory holds; NaNs that came from there stay.
struct Float32 {
  using Stored = float;
  static inline F read(const float* p) { return load(p); }
  static inline void write(float* p, F v) { store(p, v); }
  static inline F rounded(F v) { return v; }
};
struct Bfloat16 {
  using Stored = uint16_t;
  static inline F read(const uint16_t* p) { return load_bf16(p); }
  static inline void write(uint16_t* p, F v) { store_bf16(p, v); }
  static inline INLINE F rounded(F v) {
    Bits bits = bits_of(v);
    return with_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
  }
};
struct Float16 {
  using Stored = uint16_t;
  static inline F read(const uint16_t* p) { return load_f16(p); }
  static inline void write(uint16_t* p, F v) { store_f16(p, v); }
  static inline F rounded(F v) {
    uint16_t stored[W];
    store_f16(stored, v);
    return load_f16(stored);
  }
};

template <class Do>
static inline void with_type(int32_t dtype, Do&& run) {
  dtype == ZP_F32 ? run(Float32()) : dtype == ZP_BF16 ? run(Bfloat16()) : run(Float16());
}

// --- a norm ---

// The vector of a row at i, zeros behind its end.
template <class T>
static inline INLINE F row_at(const typename T::Stored* row, int64_t i, int64_t count) {
  if (i + W <= count) return T::read(row + i);
  typename T::Stored rest[W] = {};
  __builtin_memcpy(rest, row + i, (count - i) * sizeof(*rest));
  return T::read(rest);
}

template <class T>
static inline INLINE void put_at(typename T::Stored* row, int64_t i, int64_t count, F v) {
  if (i + W <= count) return T::write(row + i, v);
  typename T::Stored rest[W];
  T::write(rest, v);
  __builtin_memcpy(row + i, rest, (count - i) * sizeof(*rest));
}

template <class T, class WEIGHT>
static void normalize_row(const zp_norm& n, int64_t row) {
  int64_t k = n.columns;
  const auto* x = (const typename T::Stored*)n.x + row * k;
  const auto* weight = (const typename WEIGHT::Stored*)n.weight;
  auto* y = (typename T::Stored*)n.y + row * k;
  constexpr int SUMS = 4;
  F squares[SUMS] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + SUMS * W <= k; i += SUMS * W) {
    unroll<SUMS>([&](auto s) INLINE {
      F v = T::read(x + i + s * W);
      squares[s] = fma(v, v, squares[s]);
    });
  }
  for (; i < k; i += W) {
    F v = row_at<T>(x, i, k);
    squares[0] = fma(v, v, squares[0]);
  }
  float mean = sum(add(add(squares[0], squares[1]), add(squares[2], squares[3]))) / (float)k;
  F factor = set1(1.0f / __builtin_sqrtf(mean + n.eps)), shift = set1(n.shift);
  auto of = [&](F v, F w) INLINE {
    F normal = mul(v, factor);
    return mul(n.rounds_first ? T::rounded(normal) : normal, add(w, shift));
  };
  i = 0;
  for (; i + W <= k; i += W) T::write(y + i, of(T::read(x + i), WEIGHT::read(weight + i)));
  if (i < k) put_at<T>(y, i, k, of(row_at<T>(x, i, k), row_at<WEIGHT>(weight, i, k)));
}

static void normalize(const zp_norm& n, int64_t row0, int64_t row1) {
  with_type(n.dtype, [&](auto t) {
    with_type(n.weight_dtype, [&](auto w) {
      for (int64_t row = row0; row < row1; row++) normalize_row<decltype(t), decltype(w)>(n, row);
    });
  });
}

// --- a gate ---

// e^v, to 2 units in the last place; infinity from 88.4 on, 2^-126 below -87.4.
static inline INLINE F exponential(F v) {
  constexpr float LOG2_E = 0x1.715476p0f, LN2_HIGH = 0x1.62e4p-1f, LN2_LOW = 0x1.7f7d1cp-20f;
  constexpr float SHIFT = 0x1.8p23f + 127;  // brings an integer, and the exponent's bias, to the lowest bits
  v = min(max(v, set1(-87.4f)), set1(89));
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
  auto of = [](F a, F b) INLINE { return mul(T::rounded(activation<ACTIVATION>(a)), b); };
  int64_t i = begin;
  for (; i + W <= end; i += W) T::write(y + i, of(T::read(gate + i), T::read(up + i)));
  if (i < end) put_at<T>(y, i, end, of(row_at<T>(gate, i, end), row_at<T>(up, i, end)));
}

static void gate(const zp_gate& g, int64_t begin, int64_t end) {
  with_type(g.dtype, [&](auto t) {
    g.activation == ZP_SILU ? gate_values<decltype(t), ZP_SILU>(g, begin, end)
                            : gate_values<decltype(t), ZP_GELU_TANH>(g, begin, end);
  });
}
