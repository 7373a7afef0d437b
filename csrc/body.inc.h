// The kernels, written once over a few vector operations and compiled once for each instruction set.
//
// No include guard: an instruction set's file defines the operations inside its own namespace and includes this there,
// so that no function compiled with one set's flags can be linked into another's code. The operations are
//
//   W              floats in a vector                      F      a vector of W floats
//   TILE_N, TILE_V rows of weight x vectors of tokens whose sums stay in registers
//   zero set1 load store add sub mul div fma min max abs_max round_even sum largest       on F
//   sum4           four sums, each added up in the order of `sum`
//   transpose      W vectors as a square: lane i of vector j <-> lane j of vector i
//   load_u8 load_i8 load_f16 load_bf16 load_e4m3 load_e5m2 load_e8m0 store_f16 store_bf16   W values at a pointer <-> F
//   store_i16      rounds to nearest even and stores W int16
//   store_u8       stores W bytes; smallest and highest over the lanes
//   store_nearest16   stores W bytes: code[how many of the 15 ascending midpoints are below v]
//   load_part load_f16_part load_i8_part load_e8m0_part    the same of the first `count` < W, then what 0 stands for;
//                  whether W values before may be read, too
//   lookup16       levels[code] for W codes at a pointer, codes below 16
//   lookup256_part levels[code] for the first `count` of W codes at a pointer, of 256 levels
//   unpack, pack   codes of a packed row <-> one byte each
//   fetches_soon   whether bytes of one token are best fetched soon before they are used, by one instruction
//   Integer<BITS, Q>, Codebook   codes of a packed row as integers, and activations of Q bytes to multiply them by:
//       CHUNK codes of BITS bits at a time, from a row (codes, codes_part), and BYTES of activations (arrange); mac: W
//       sums of their products; Lanes: Positions of a chunk's factors, and take: a vector of those, each sum its own;
//       real = scale * unit * (sum - HALF * sum of activations)

// --- weights ---

static inline float scalar_f16(uint16_t h) {
#ifdef __F16C__
  return _cvtsh_ss(h);
#endif
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
  uint32_t bits;
  if (rest >= 0x7c00) {  // Inf and NaN
    bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  } else if (rest >= 0x400) {
    bits = sign | ((rest << 13) + ((127 - 15) << 23));
  } else {  // subnormal: rest * 2^-24
    float f = (float)rest * 0x1p-24f;
    __builtin_memcpy(&bits, &f, 4);
    bits |= sign;
  }
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

static inline float scalar_bf16(uint16_t h) {
  uint32_t bits = (uint32_t)h << 16;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

static inline float scalar_e8m0(uint8_t exponent) {  // 2^-127 is a subnormal, 255 NaN
  uint32_t bits = (uint32_t)exponent << 23 | (exponent == 0 || exponent == 255) << 22;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

static inline float read_float(const void* p, int64_t i, int32_t dtype) {
  if (dtype == ZP_F32) return ((const float*)p)[i];
  if (dtype == ZP_E8M0) return scalar_e8m0(((const uint8_t*)p)[i]);
  uint16_t h = ((const uint16_t*)p)[i];
  return dtype == ZP_F16 ? scalar_f16(h) : scalar_bf16(h);
}

// count floats of any dtype -> float32.
static inline void to_f32(const void* p, int32_t dtype, int64_t count, float* out) {
  int64_t i = 0;
  if (dtype == ZP_F32) {
    __builtin_memcpy(out, p, count * 4);
    return;
  }
  const uint16_t* h = (const uint16_t*)p;
  if (dtype == ZP_F16) {
    for (; i + W <= count; i += W) store(out + i, load_f16(h + i));
  } else {
    for (; i + W <= count; i += W) store(out + i, load_bf16(h + i));
  }
  for (; i < count; i++) out[i] = read_float(p, i, dtype);
}

// count float32 -> floats of any dtype, round to nearest even.
static inline void from_f32(const float* p, int32_t dtype, int64_t count, void* out) {
  if (dtype == ZP_F32) {
    __builtin_memcpy(out, p, count * 4);
    return;
  }
  uint16_t* h = (uint16_t*)out;
  int64_t i = 0;
  if (dtype == ZP_F16) {
    for (; i + W <= count; i += W) store_f16(h + i, load(p + i));
  } else {
    for (; i + W <= count; i += W) store_bf16(h + i, load(p + i));
  }
  if (i < count) {
    float rest[W] = {};
    uint16_t narrow[W];
    int64_t some = count - i;
    if (W > 4 && some == 4) {  // rows of weights are done by fours
      __builtin_memcpy(rest, p + i, 16);
    } else {
      __builtin_memcpy(rest, p + i, some * 4);
    }
    if (dtype == ZP_F16) {
      store_f16(narrow, load(rest));
    } else {
      store_bf16(narrow, load(rest));
    }
    if (W > 4 && some == 4) {
      __builtin_memcpy(h + i, narrow, 8);
    } else {
      __builtin_memcpy(h + i, narrow, some * 2);
    }
  }
}

static inline int64_t packed_row_bytes(const zp_format& f) { return (f.k * f.bits + 7) / 8; }

// Scales in 8 bits: the mean of all; then of each 256 the largest, and their bytes.
struct DoubleQuantized {
  static constexpr int64_t BLOCK = 256, FLOAT = 4;
  const float mean, largest;
  const uint8_t* const code;
  const int64_t left;  // in the block, from this one on
  DoubleQuantized(const void* scale, int64_t i)
      : DoubleQuantized(*(const float*)scale, (const uint8_t*)scale + FLOAT + i / BLOCK * (FLOAT + BLOCK), i % BLOCK) {}

 private:
  DoubleQuantized(float of_all, const uint8_t* block, int64_t at)
      : mean(of_all), largest(*(const float*)block), code(block + FLOAT + at), left(BLOCK - at) {}
};

static inline float read_scale(const zp_format& f, const void* scale, int64_t i) {
  if (f.scale_dtype != ZP_DOUBLE_QUANT) return read_float(scale, i, f.scale_dtype);
  DoubleQuantized s(scale, i);
  return f.scale_levels[*s.code] * s.largest + s.mean;
}

static inline float scale_of(const zp_weight& w, int64_t row, int64_t group) {
  return read_scale(*w.format, w.scale, row * w.format->scale_stride + group);
}

static inline float read_zero_point(const zp_format& f, const void* zero_point, int64_t i) {
  return f.float_zero_point ? scalar_f16(((const uint16_t*)zero_point)[i]) : (float)((const int8_t*)zero_point)[i];
}

// What is subtracted from a stored code: it is unsigned on disk.
static inline float offset_of(const zp_weight& w, int64_t row, int64_t group) {
  if (w.format->kind == ZP_CODEBOOK) return 0;
  float half = (float)(1 << (w.format->bits - 1));
  if (!w.zero_point) return half;
  return half + read_zero_point(*w.format, w.zero_point, row * w.format->scale_stride + group);
}

static inline bool is_integer(const Job& j) { return j.format->kind == ZP_INTEGER; }

static inline bool is_float8(const zp_format& f) { return f.kind == ZP_FLOAT8_E4M3FN || f.kind == ZP_FLOAT8_E5M2; }

static inline zp_weight weight_of(const Job& j) { return {j.format, j.packed, j.scale, j.zero_point, j.levels}; }

// The 16 levels of a row, in `own` where the row has some of its own.
static inline const float* levels_of(const zp_weight& w, int64_t row, float* own) {
  if (!w.levels) return w.format->levels;
  to_f32((const uint16_t*)w.levels + (w.format->scale_stride ? 16 * row : 0), ZP_F16, 16, own);
  return own;
}

// e4m3fn is float16 with one exponent bit less, so its bits moved into float16's place are 2^-8 of the value; only its
// NaN, the largest code, is something else. e5m2 is float16's upper byte.
static inline float e4m3(uint8_t c) {
  if ((c & 0x7f) == 0x7f) return __builtin_nanf("");
  return scalar_f16((uint16_t)((c & 0x80) << 8 | (c & 0x7f) << 7)) * 256.0f;
}

// Columns [k0, k1) of a row as float32. k0 is a multiple of 32.
static inline void decode_columns(const zp_weight& w, int64_t row, int64_t k0, int64_t k1, float* out) {
  const zp_format& f = *w.format;
  const uint8_t* p = w.packed + row * packed_row_bytes(f);
  if (f.kind == ZP_BFLOAT16 || f.kind == ZP_FLOAT16) {
    to_f32(p + 2 * k0, f.kind == ZP_FLOAT16 ? ZP_F16 : ZP_BF16, k1 - k0, out);
    return;
  }
  constexpr int STEP = 256;  // codes unpacked at a time
  alignas(64) uint8_t codes[STEP + 64];
  alignas(64) float own[16];
  const float* levels = f.kind == ZP_CODEBOOK ? levels_of(w, row, own) : nullptr;
  for (int64_t k = k0; k < k1; k += STEP) {
    int64_t count = k1 - k < STEP ? k1 - k : STEP;
    const uint8_t* c = p + k * f.bits / 8;
    bool is_e4m3 = f.kind == ZP_FLOAT8_E4M3FN;
    if (!is_float8(f)) unpack(c, f.bits, count, codes);
    int64_t group = k / f.group_size;
    for (int64_t i = 0; i < count; group++) {
      int64_t end = (group + 1) * f.group_size - k;
      if (end > count) end = count;
      float s = scale_of(w, row, group);
      float* o = out + k - k0;
      F vs = set1(s);
      if (f.kind == ZP_INTEGER) {
        float z = offset_of(w, row, group);
        F vz = set1(z);
        for (; i + W <= end; i += W) store(o + i, mul(sub(load_u8(codes + i), vz), vs));
        for (; i < end; i++) o[i] = ((float)codes[i] - z) * s;
      } else if (f.kind == ZP_CODEBOOK) {
        for (; i + W <= end; i += W) store(o + i, mul(lookup16(levels, codes + i), vs));
        for (; i < end; i++) o[i] = levels[codes[i] & 15] * s;
      } else if (is_e4m3) {
        for (; i + W <= end; i += W) store(o + i, mul(load_e4m3(c + i), vs));
        for (; i < end; i++) o[i] = e4m3(c[i]) * s;
      } else {
        for (; i + W <= end; i += W) store(o + i, mul(load_e5m2(c + i), vs));
        for (; i < end; i++) o[i] = scalar_f16((uint16_t)(c[i] << 8)) * s;
      }
    }
  }
}

static void decode(const zp_weight& w, int64_t row, int32_t dtype, void* out) {
  const zp_format& f = *w.format;
  if (dtype == ZP_F32) {
    decode_columns(w, row, 0, f.k, (float*)out);
    return;
  }
  constexpr int64_t STEP = 1024;
  alignas(64) float part[STEP];
  for (int64_t k = 0; k < f.k; k += STEP) {
    int64_t end = k + STEP < f.k ? k + STEP : f.k;
    decode_columns(w, row, k, end, part);
    from_f32(part, dtype, end - k, (uint16_t*)out + k);
  }
}

// --- activations ---

static constexpr int64_t PAD = 64;  // floats read past the end of an array of scales

static inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

static inline const uint8_t* x_row(const Job& j, int64_t m) {
  return (const uint8_t*)j.x + m * j.x_stride * (j.x_dtype == ZP_F32 ? 4 : 2);
}

static constexpr float Q16_MAX = 127 * 256 + 127;  // both planes of q = 256 * high + low fit int8
static constexpr float Q15_MAX = 16383;            // times levels of up to 2^14, 8 products fit 32 bits

// x / divisor as division rounds it, from RN(1 / divisor), by fused multiplications (Markstein, IBM J. Res. Dev. 34,
// 1990), as long as no remainder is subnormal: a vector of divisions takes as long as 16 of them.
static inline F quotient(F x, F divisor, F minus_divisor, F inverse) {
  if constexpr (W == 1) return div(x, divisor);  // where fma is not fused
  F q = mul(x, inverse);
  q = fma(fma(q, minus_divisor, x), inverse, q);
  return fma(fma(q, minus_divisor, x), inverse, q);
}

// The largest magnitude of x[begin, end), whole blocks of 32, or NaN.
static inline float magnitude(const float* x, int64_t begin, int64_t end) {
  F top[2] = {zero(), zero()};
  for (int64_t i = begin; i < end; i += 2 * W)
    top[0] = abs_max(top[0], load(x + i)), top[1] = abs_max(top[1], load(x + i + W));
  return largest(abs_max(top[0], top[1]));
}

// How values whose largest magnitude is `amax` become integers up to `limit`.
struct TokenScale {
  float scale, inverse;
  TokenScale(float amax, float limit, bool bytes) {
    scale = amax / limit;
    if (!bytes && amax > 0 && scale < 0x1p-126f) scale = 0x1p-126f;  // whose inverse is a number
    inverse = scale > 0 ? 1.0f / scale : 0.0f;
    if (amax - amax != 0) scale = __builtin_nanf("");  // Inf or NaN in, NaN out
  }
  float divisor() const { return scale > 0 ? scale : 1.0f; }
  bool has_quotient() const { return scale == 0 || (scale > 0x1p-60f && scale < 0x1p60f); }
};

// One token: q (blocks * block values, zero past k), x_scale and x_scale * sum(q) of each block.
static void quantize_token(const Job& j, int64_t m, float* x, int16_t* q, float* x_scale, float* x_sum) {
  int64_t k = j.format->k, padded = round_up(k, 64);
  to_f32(x_row(j, m), j.x_dtype, k, x);
  for (int64_t i = k; i < padded; i++) x[i] = 0;
  bool bytes = j.int8_activations;
  float limit = bytes ? 127.0f : j.format->kind == ZP_CODEBOOK ? Q15_MAX : Q16_MAX;
  float whole = bytes ? magnitude(x, 0, padded) : 0;
  for (int64_t b = 0; b < j.blocks; b++) {
    int64_t begin = b * j.block, end = begin + j.block < padded ? begin + j.block : padded;
    float amax = bytes ? whole : magnitude(x, begin, end);
    TokenScale token(amax, limit, bytes);
    F factor = set1(token.inverse), divisor = set1(token.divisor()), minus_divisor = sub(zero(), divisor);
    F total[2] = {zero(), zero()};
    auto round_all = [&](auto ratio) INLINE {
      for (int64_t i = begin; i < end; i += 2 * W) {
        unroll<2>([&](auto h) INLINE {
          F rounded = round_even(ratio(load(x + i + h * W)));
          store_i16(q + i + h * W, rounded);
          total[h] = add(total[h], rounded);
        });
      }
    };
    if (!bytes) {
      round_all([&](F v) INLINE { return mul(v, factor); });
    } else if (token.has_quotient()) {
      round_all([&](F v) INLINE { return quotient(v, divisor, minus_divisor, factor); });
    } else {
      round_all([&](F v) INLINE { return div(v, divisor); });
    }
    x_scale[b] = token.scale;
    x_sum[b] = token.scale * sum(add(total[0], total[1]));
  }
}

// Weights are fetched before they are used, across pages and rows: to the second-level cache, for which more lines can
// be on their way than to the first, and to this soon before. Distances in bytes.
struct Ahead {
  int64_t far = 6144, near = 512;
};

// STEP: bytes from one call to the next; of few of them unpacking is what takes time, with short vectors more of it,
// and so one instruction has to do.
template <int64_t STEP>
static inline INLINE void fetch(const void* p, Ahead ahead = {}) {
  constexpr bool TWICE = STEP * W >= 512;
  __builtin_prefetch((const uint8_t*)p + ahead.far, 0, TWICE ? 2 : 3);
  if (TWICE) __builtin_prefetch((const uint8_t*)p + ahead.near);
}

// For what is used nearly as fast as it can be read, where `fetches_soon`.
static inline INLINE void fetch_soon(const void* p) { __builtin_prefetch((const uint8_t*)p + 1536); }

// Scales and zero points of later rows: a row has too few for hardware to see that they are read one after the other.
template <class T>
static inline INLINE void fetch_later(const T* p) {
  __builtin_prefetch(p + 1024);
}

// --- dot: few tokens, every weight used as soon as it is unpacked ---

struct Token {  // of a prepared job of integers or codebooks
  const uint8_t* q;
  const float* scale;
  const float* sum;
};

template <class Source>
static size_t arranged_bytes(const Job& j) {
  int64_t chunks = (j.format->k + Source::CHUNK - 1) / Source::CHUNK;
  return round_up(chunks * Source::BYTES, 64);
}

static inline size_t sums_bytes(const Job& j) { return round_up((j.blocks + PAD) * 4, 64); }

template <class Source>
static inline Token token(const Job& j, int64_t m) {
  size_t size = arranged_bytes<Source>(j), sums = sums_bytes(j);
  const uint8_t* p = j.prepared + m * (size + 2 * sums);
  return {p, (const float*)(p + size), (const float*)(p + size + sums)};
}

template <class Source>
static void prepare_dot(const Job& j, int64_t m) {
  constexpr int CHUNK = Source::CHUNK;
  Token t = token<Source>(j, m);
  int64_t chunks = (j.format->k + CHUNK - 1) / CHUNK, padded = round_up(chunks * CHUNK, 128);
  float* x = (float*)__builtin_alloca(padded * 4 + 64);
  int16_t* q = (int16_t*)__builtin_alloca(padded * 2 + 64);
  int64_t filled = round_up(j.format->k, 64);
  for (int64_t i = filled; i < padded; i++) q[i] = 0;
  quantize_token(j, m, x, q, (float*)t.scale, (float*)t.sum);
  for (int64_t i = 0; i < PAD; i++) ((float*)t.scale)[j.blocks + i] = ((float*)t.sum)[j.blocks + i] = 0;
  uint8_t* out = (uint8_t*)t.q;
  for (int64_t c = 0; c < chunks; c++) {
    Source::arrange(q + c * CHUNK, out + c * Source::BYTES);
  }
}

// y: outputs of a token from n on.
static inline void put(const Job& j, int64_t m, int64_t n, float* y, int64_t count) {
  for (int64_t i = 0; j.bias && i < count; i++) y[i] += read_float(j.bias, n + i, j.bias_dtype);
  from_f32(y, j.x_dtype, count, (uint8_t*)j.y + (m * j.format->n + n) * (j.x_dtype == ZP_F32 ? 4 : 2));
}

static inline void put(const Job& j, int64_t m, int64_t n, float value) { put(j, m, n, &value, 1); }

// Sums of a token's products with the codes of rows of one scale each -> outputs, token_sum being the sum of the token.
static inline void scale_rows(const Job& j, int64_t n, int64_t count, float token_sum, float* y) {
  const zp_weight w = weight_of(j);
  float scale[W] = {}, offset[W] = {};
  for (int64_t i = 0; i < count; i += W) {
    for (int64_t l = 0; l < W && i + l < count; l++) {
      scale[l] = scale_of(w, n + i + l, 0), offset[l] = offset_of(w, n + i + l, 0);
    }
    store(y + i, mul(load(scale), sub(load(y + i), mul(load(offset), set1(token_sum)))));
  }
}

// Outputs of MR tokens from row to row, kept until there is a line of them to convert and write.
template <int MR>
struct Outputs {
  static constexpr int64_t SIZE = 64;
  const Job& j;
  int64_t m, n, count = 0;
  bool scaled = true;  // else they are sums of products with codes, and
  float token_sum[MR] = {};
  alignas(64) float y[MR][SIZE];

  Outputs(const Job& job, int64_t m0, int64_t n0) : j(job), m(m0), n(n0) {}
  Outputs(const Outputs&) = delete;
  ~Outputs() { flush(); }

  inline float* of(int r) { return y[r] + count; }  // where the next rows' go
  inline INLINE void add(int64_t rows) {            // which do not cross a multiple of SIZE
    count += rows;
    if (count == SIZE) flush();
  }
  void flush() {
    for (int r = 0; r < MR; r++) {
      if (!scaled) scale_rows(j, n, count, token_sum[r], y[r]);
      put(j, m + r, n, y[r], count);
    }
    n += count, count = 0;
  }
};

static __attribute__((noinline, cold)) F read_scales(const zp_format& f, const void* scale, int64_t at, int64_t count) {
  alignas(64) float values[W] = {};
  for (int64_t i = 0; i < W && i < count; i++) values[i] = read_scale(f, scale, at + i);
  return load(values);
}

// W scales of this dtype (f's) from `at` on, of which only `count` need be there: past them is what a byte or a word of
// 0 stands for. before: whether there are as many before.
static inline INLINE F scales_at(const zp_format& f, int32_t dtype, const void* scale, int64_t at, int64_t count,
                                 bool before) {
  if (dtype == ZP_F16) {
    const uint16_t* p = (const uint16_t*)scale + at;
    fetch_later(p);
    return count >= W ? load_f16(p) : load_f16_part(p, count, before);
  }
  if (dtype == ZP_F32) {
    const float* p = (const float*)scale + at;
    fetch_later(p);
    return count >= W ? load(p) : load_part(p, count);
  }
  if (dtype == ZP_E8M0) {
    const uint8_t* p = (const uint8_t*)scale + at;
    fetch_later(p);
    return count >= W ? load_e8m0(p) : load_e8m0_part(p, count, before);
  }
  if (dtype == ZP_DOUBLE_QUANT) {
    DoubleQuantized s(scale, at);
    fetch_later(s.code);
    if (s.left >= (count < W ? count : W)) {
      return add(mul(lookup256_part(f.scale_levels, s.code, count), set1(s.largest)), set1(s.mean));
    }
  }
  return read_scales(f, scale, at, count);
}

static inline INLINE F zero_points_at(const void* zero_point, bool is_float, int64_t at, int64_t count, bool before) {
  if (!is_float) {
    const int8_t* p = (const int8_t*)zero_point + at;
    fetch_later(p);
    return count >= W ? load_i8(p) : load_i8_part(p, count, before);
  }
  const uint16_t* p = (const uint16_t*)zero_point + at;
  fetch_later(p);
  return count >= W ? load_f16(p) : load_f16_part(p, count, before);
}

// Scales and zero points of the blocks of a row from b on, W of them.
struct Blocks {
  const zp_format& f;
  const void *scale, *zero_point;
  const int64_t count, per_group, stride;
  const bool of_rows;
  // Of f, once: asking it again for each row takes a few percent.
  const int32_t as_stored;  // the dtype of scales of which vectors are read as they lie, or -1
  const bool has_zero_points, float_zero_points;

  explicit Blocks(const Job& j)
      : f(*j.format),
        scale(j.scale),
        zero_point(j.zero_point),
        count(j.blocks),
        per_group(f.group_size / j.block),
        stride(f.scale_stride),
        of_rows(f.group_size >= f.k),
        as_stored(per_group == 1 && !of_rows ? f.scale_dtype : -1),
        has_zero_points(zero_point),
        float_zero_points(f.float_zero_point) {}

  inline INLINE F scales(int64_t n, int64_t b) const {
    if (as_stored >= 0) return scales_at(f, as_stored, scale, n * stride + b, count - b, b > 0);
    if (of_rows) return set1(read_scale(f, scale, n * stride));
    return of_groups(b, [&](int64_t group) { return read_scale(f, scale, n * stride + group); });
  }

  inline INLINE F zero_points(int64_t n, int64_t b) const {
    if (!has_zero_points) return zero();
    if (as_stored >= 0) return zero_points_at(zero_point, float_zero_points, n * stride + b, count - b, b > 0);
    if (of_rows) return set1(read_zero_point(f, zero_point, n * stride));
    return of_groups(b, [&](int64_t group) { return read_zero_point(f, zero_point, n * stride + group); });
  }

  template <class Read>
  __attribute__((noinline)) F of_groups(int64_t b, const Read& read) const {
    alignas(64) float values[W] = {};
    int64_t group = b / per_group, blocks = per_group - b % per_group;
    for (int64_t i = 0; i < W && i < count - b; i++) {
      values[i] = read(group);
      if (--blocks == 0) group++, blocks = per_group;
    }
    return load(values);
  }
};

// Rows [n0, n1) times MR tokens from m0 on.
template <class Source, int MR>
static void dot_integer(const Job& j, int64_t m0, int64_t n0, int64_t n1) {
  constexpr int CHUNK = Source::CHUNK, CHUNK_BYTES = CHUNK * Source::BITS / 8, BYTES = Source::BYTES;
  constexpr int TOGETHER = 4;                                     // rows whose sums are added up at the same time
  constexpr bool AT_ONCE = W == 8 && Source::BITS == 8;           // used nearly as fast as they can be read
  constexpr int PAIR = AT_ONCE || 2 * CHUNK_BYTES <= 64 ? 2 : 1;  // chunks of one turn of the loop
  const bool soon = AT_ONCE && MR == 1 && fetches_soon();
  const zp_format& f = *j.format;
  const zp_weight w = weight_of(j);
  const int64_t last = (f.k + CHUNK - 1) / CHUNK - 1, last_bytes = j.row_bytes - last * CHUNK_BYTES;
  const bool by_row = is_integer(j) && f.group_size >= f.k;  // one scale: applied at the end
  Token t[MR];
  Outputs<MR> outputs(j, m0, n0);
  outputs.scaled = !by_row;
  for (int r = 0; r < MR; r++) {
    t[r] = token<Source>(j, m0 + r);
    for (int64_t b = 0; by_row && b < j.blocks; b++) outputs.token_sum[r] += t[r].sum[b];
  }
  const F half = set1(Source::HALF);
  const Blocks blocks(j);
  const typename Source::Lanes lanes(j.block);
  const int64_t stride = j.blocks + PAD;
  float* factors = (float*)__builtin_alloca(MR * stride * 4);  // of a row: scale * x_scale
  for (int64_t i = 0; i < MR * stride; i++) factors[i] = 0;
  const float* factor[MR];
  for (int r = 0; r < MR; r++) factor[r] = by_row ? t[r].scale : factors + r * stride;
  alignas(64) float own[16];
  Source source{IntegerLevels(levels_of(w, n0, own))};
  alignas(64) float totals[MR][TOGETHER][W];
  for (int64_t n = n0; n < n1;) {
    int64_t rows = n1 - n < TOGETHER ? n1 - n : TOGETHER;
    for (int64_t i = 0; i < rows;
         i++) {  // not unrolled: hardware fetches ahead of one instruction that reads on and on
      const uint8_t* p = j.packed + (n + i) * j.row_bytes;
      F total[MR];
      unroll<MR>([&](auto r) INLINE { total[r] = zero(); });
      if (w.levels) source = Source(IntegerLevels(levels_of(w, n + i, own)));
      for (int64_t b = 0; b < j.blocks && !by_row; b += W) {  // first the sum of scale * offset * x_sum is taken away
        F scale = blocks.scales(n + i, b), minus = mul(add(blocks.zero_points(n + i, b), half), scale);
        unroll<MR>([&](auto r) INLINE {
          store(factors + r * stride + b, mul(scale, load(t[r].scale + b)));
          total[r] = sub(total[r], mul(minus, load(t[r].sum + b)));
        });
      }
      lanes.by_blocks([&](auto blocks_of_chunk) INLINE {
        auto use = [&](const auto& codes, int64_t c, int64_t at) INLINE {
          unroll<MR>([&](auto r) INLINE {
            F each = lanes.template take<blocks_of_chunk>(factor[r] + at);
            total[r] = fma(Source::mac(codes, t[r].q + c * BYTES), each, total[r]);
          });
        };
        int64_t c = 0;
        for (; c + PAIR <= last; c += PAIR) {
          constexpr int LINES = (PAIR * CHUNK_BYTES + 63) / 64;
          unroll<LINES>([&](auto line) INLINE {
            const uint8_t* now = p + c * CHUNK_BYTES + 64 * line;
            soon ? fetch_soon(now) : fetch<PAIR * CHUNK_BYTES / LINES>(now);
          });
          int64_t at = lanes.first(c);
          unroll<PAIR>([&](auto u)
                           INLINE { use(source.codes(p + (c + u) * CHUNK_BYTES), c + u, at + u * lanes.step); });
        }
        for (; c < last; c++) use(source.codes(p + c * CHUNK_BYTES), c, lanes.first(c));
        use(source.codes_part(p + last * CHUNK_BYTES, last_bytes), last, lanes.first(last));
      });
      unroll<MR>([&](auto r) INLINE { store(totals[r][i], mul(total[r], set1(source.unit))); });
    }
    for (int r = 0; r < MR; r++) {
      float* y = outputs.of(r);
      if (rows == TOGETHER) {
        sum4(load(totals[r][0]), load(totals[r][1]), load(totals[r][2]), load(totals[r][3]), y);
      } else {
        for (int64_t i = 0; i < rows; i++) y[i] = sum(load(totals[r][i]));
      }
    }
    outputs.add(rows);
    n += rows;
  }
}

template <class Source>
static void dot_integer_rows(const Job& j, int64_t n0, int64_t n1) {
  int64_t m = 0;
  for (; m + 4 <= j.m; m += 4) dot_integer<Source, 4>(j, m, n0, n1);
  if (m + 2 <= j.m) dot_integer<Source, 2>(j, m, n0, n1), m += 2;
  if (m < j.m) dot_integer<Source, 1>(j, m, n0, n1);
}

// A float job: tokens as float32, rows padded to 128 so that vectors may be read whole.
static inline int64_t float_stride(const Job& j) { return round_up(j.format->k, 128); }

// A token as float32, rounded to int8 and back when the scheme says so. padded: k rounded up to a multiple of 64.
static void read_token(const Job& j, int64_t m, int64_t padded, float* x) {
  int64_t k = j.format->k;
  to_f32(x_row(j, m), j.x_dtype, k, x);
  for (int64_t i = k; i < padded; i++) x[i] = 0;
  if (!j.int8_activations) return;
  F top = zero();
  for (int64_t i = 0; i < padded; i += W) top = abs_max(top, load(x + i));
  float amax = largest(top), scale = amax / 127.0f;
  if (amax - amax != 0) {  // Inf or NaN in, NaN out
    for (int64_t i = 0; i < k; i++) x[i] = __builtin_nanf("");
  } else if (scale > 0) {
    for (int64_t i = 0; i < padded; i += W) {
      store(x + i, mul(round_even(div(load(x + i), set1(scale))), set1(scale)));
    }
  }
}

static void prepare_float(const Job& j, int64_t m) {
  read_token(j, m, float_stride(j), (float*)j.prepared + m * float_stride(j));
}

// Rows of float16 or bfloat16 are used as they are read.
template <int32_t DTYPE, int MR>
static void dot_downcast(const Job& j, int64_t m0, int64_t n0, int64_t n1) {
  constexpr int64_t STEP = 2 * W;
  int64_t k = j.format->k, whole = k / STEP * STEP;
  const float* x = (const float*)j.prepared + m0 * float_stride(j);
  Outputs<MR> outputs(j, m0, n0);
  for (int64_t n = n0; n < n1; n++) {
    const uint16_t* row = (const uint16_t*)(j.packed + n * j.row_bytes);
    F total[MR][2];
    unroll<MR>([&](auto r) INLINE { total[r][0] = total[r][1] = zero(); });
    auto multiply = [&](const uint16_t* p, int64_t i) INLINE {
      unroll<2>([&](auto u) INLINE {
        F weight = DTYPE == ZP_F16 ? load_f16(p + u * W) : load_bf16(p + u * W);
        unroll<MR>([&](auto r)
                       INLINE { total[r][u] = fma(weight, load(x + r * float_stride(j) + i + u * W), total[r][u]); });
      });
    };
    for (int64_t i = 0; i < whole; i += STEP) {
      fetch<2 * STEP>(row + i);
      multiply(row + i, i);
    }
    if (whole < k) {
      uint16_t rest[STEP] = {};
      __builtin_memcpy(rest, row + whole, (k - whole) * 2);
      multiply(rest, whole);
    }
    unroll<MR>([&](auto r) INLINE { *outputs.of(r) = sum(add(total[r][0], total[r][1])); });
    outputs.add(1);
  }
}

template <int32_t DTYPE>
static void dot_downcast_rows(const Job& j, int64_t n0, int64_t n1) {
  int64_t m = 0;
  for (; m + 4 <= j.m; m += 4) dot_downcast<DTYPE, 4>(j, m, n0, n1);
  if (m + 2 <= j.m) dot_downcast<DTYPE, 2>(j, m, n0, n1), m += 2;
  if (m < j.m) dot_downcast<DTYPE, 1>(j, m, n0, n1);
}

static void dot_float_rows(const Job& j, int64_t n0, int64_t n1, float* row) {
  if (j.format->kind == ZP_FLOAT16) return dot_downcast_rows<ZP_F16>(j, n0, n1);
  if (j.format->kind == ZP_BFLOAT16) return dot_downcast_rows<ZP_BF16>(j, n0, n1);
  const zp_weight w = weight_of(j);
  int64_t k = j.format->k, padded = round_up(k, 4 * W);
  for (int64_t i = k; i < padded; i++) row[i] = 0;
  for (int64_t n = n0; n < n1; n++) {
    decode_columns(w, n, 0, k, row);
    for (int64_t m = 0; m < j.m; m++) {
      const float* x = (const float*)j.prepared + m * float_stride(j);
      F total[4] = {zero(), zero(), zero(), zero()};
      for (int64_t i = 0; i < padded; i += 4 * W) {
        unroll<4>([&](auto u) INLINE { total[u] = fma(load(row + i + u * W), load(x + i + u * W), total[u]); });
      }
      put(j, m, n, sum(add(add(total[0], total[1]), add(total[2], total[3]))));
    }
  }
}

// --- gemm: many tokens. Weight rows are decoded once into a panel; tokens are the vector lanes ---
//
//   prepared: [m / TILE_M][k][TILE_M] words, zero past m        panel: [rows][DEPTH] words
//   sums:     [rows][tokens] float32, in cache
//
// A word of 32 bits is what one multiplication takes of a token or of a row: COLUMNS columns; of Floats, one float32.

static constexpr int TILE_M = TILE_V * W;
static constexpr int64_t DEPTH = 512;

struct Floats {
  static constexpr int64_t COLUMNS = 1;
  static inline F mac(F weight, F token, F acc) { return fma(weight, token, acc); }
  static inline void token(const Job& j, int64_t m, int64_t padded, float* words) { read_token(j, m, padded, words); }
  static inline void decode(const zp_weight& w, int64_t row, int64_t k0, int64_t k1, float* words) {
    decode_columns(w, row, k0, k1, words);
  }
};

template <class Word>
static inline int64_t words_of(int64_t columns) {
  return (columns + Word::COLUMNS - 1) / Word::COLUMNS;
}

template <class Word>
static size_t prepared_gemm_bytes(const Job& j) {
  return round_up(j.m, TILE_M) * words_of<Word>(j.format->k) * 4;
}

template <class Word>
static void prepare_gemm(const Job& j, int64_t unit) {
  int64_t k = words_of<Word>(j.format->k), m0 = unit * TILE_M;
  float* out = (float*)j.prepared + m0 * k;
  float* x = (float*)__builtin_alloca(round_up(j.format->k, 64) * 4);
  for (int64_t r = 0; r < TILE_M; r++) {
    if (m0 + r < j.m) {
      Word::token(j, m0 + r, round_up(j.format->k, 64), x);
    } else {
      for (int64_t i = 0; i < k; i++) x[i] = 0;
    }
    for (int64_t i = 0; i < k; i++) out[i * TILE_M + r] = x[i];
  }
}

template <class Word, int NR, int NV>
static inline void gemm_tile(const float* panel, const float* x, int64_t depth, float* sums, int64_t stride) {
  F acc[NR][NV];
  unroll<NR>([&](auto i) INLINE { unroll<NV>([&](auto v) INLINE { acc[i][v] = load(sums + i * stride + v * W); }); });
  for (int64_t k = 0; k < depth; k++) {
    F b[NV];
    unroll<NV>([&](auto v) INLINE { b[v] = load(x + k * TILE_M + v * W); });
    unroll<NR>([&](auto i) INLINE {
      F a = set1(panel[i * DEPTH + k]);
      unroll<NV>([&](auto v) INLINE { acc[i][v] = Word::mac(a, b[v], acc[i][v]); });
    });
  }
  unroll<NR>([&](auto i) INLINE { unroll<NV>([&](auto v) INLINE { store(sums + i * stride + v * W, acc[i][v]); }); });
}

template <class Word, int NV>
static void gemm_rows(const float* panel, const float* x, int64_t depth, float* sums, int64_t stride, int64_t rows) {
  constexpr int NR = NV == 1 ? 2 * TILE_N : TILE_N;  // as many sums as it takes to keep the multipliers busy
  int64_t i = 0;
  for (; i + NR <= rows; i += NR) {
    gemm_tile<Word, NR, NV>(panel + i * DEPTH, x, depth, sums + i * stride, stride);
  }
  for (; i < rows; i++) gemm_tile<Word, 1, NV>(panel + i * DEPTH, x, depth, sums + i * stride, stride);
}

// sums (rows, stride), whose columns are tokens up to a multiple of W -> y (tokens, n), transposed, bias added.
static void put_transposed(const Job& j, const float* sums, int64_t stride, int64_t m0, int64_t tokens, int64_t n0,
                           int64_t rows) {
  int64_t size = j.x_dtype == ZP_F32 ? 4 : 2;
  for (int64_t r = 0; r < rows; r += W) {
    int64_t count = rows - r < W ? rows - r : W;
    float bias[W] = {};
    for (int64_t i = 0; j.bias && i < count; i++) bias[i] = read_float(j.bias, n0 + r + i, j.bias_dtype);
    for (int64_t m = 0; m < tokens; m += W) {
      F square[W];
      for (int64_t i = 0; i < count; i++) square[i] = load(sums + (r + i) * stride + m);
      for (int64_t i = count; i < W; i++) square[i] = zero();
      transpose(square);
      for (int64_t t = 0; t < W && m + t < tokens; t++) {
        F y = add(square[t], load(bias));
        uint8_t* to = (uint8_t*)j.y + ((m0 + m + t) * j.format->n + n0 + r) * size;
        float line[W];
        store(line, y);
        from_f32(line, j.x_dtype, count, to);
      }
    }
  }
}

template <class Word>
static void gemm(const Job& j, int64_t n0, int64_t n1, uint8_t* scratch) {
  constexpr int64_t COLUMNS = DEPTH * Word::COLUMNS;
  const zp_weight w = weight_of(j);
  int64_t k = j.format->k, rows = n1 - n0, tokens = round_up(j.m, TILE_M);
  float* panel = (float*)scratch;
  float* sums = panel + rows * DEPTH;
  for (int64_t i = 0; i < rows * tokens; i++) sums[i] = 0;
  for (int64_t k0 = 0; k0 < k; k0 += COLUMNS) {
    int64_t columns = k - k0 < COLUMNS ? k - k0 : COLUMNS, depth = words_of<Word>(columns);
    for (int64_t r = 0; r < rows; r++) Word::decode(w, n0 + r, k0, k0 + columns, panel + r * DEPTH);
    for (int64_t m = 0; m < j.m; m += TILE_M) {
      const float* x = (const float*)j.prepared + m * words_of<Word>(k) + k0 / Word::COLUMNS * TILE_M;
      int64_t vectors = (j.m - m + W - 1) / W;
      if (vectors >= TILE_V) {
        gemm_rows<Word, TILE_V>(panel, x, depth, sums + m, tokens, rows);
      } else if (vectors >= 3) {
        gemm_rows<Word, 3>(panel, x, depth, sums + m, tokens, rows);
      } else if (vectors == 2) {
        gemm_rows<Word, 2>(panel, x, depth, sums + m, tokens, rows);
      } else {
        gemm_rows<Word, 1>(panel, x, depth, sums + m, tokens, rows);
      }
    }
  }
  put_transposed(j, sums, tokens, 0, j.m, n0, rows);
}

#include "between.inc.h"

// Stays behind between.inc.h, whose types it reads and writes.
#include "attention.inc.h"
#include "encode.inc.h"

// --- the functions of kernels.h's table ---

static bool tile(const Job& j) { return j.m >= 12; }

static int64_t tokens(const Job& j) { return j.tiled ? TILE_M : 1; }

// Jobs of few tokens whose codes and activations are multiplied as integers.
static inline bool in_integers(const Job& j) { return !j.tiled && (is_integer(j) || j.format->kind == ZP_CODEBOOK); }

// Function<Source>::call for the source of codes that a job in integers has.
template <template <class> class Function>
struct OfJob {
  template <int BITS>
  struct Of {
    template <class... Arguments>
    static auto call(const Job* j, Arguments... arguments) {
      return j->int8_activations ? Function<Integer<BITS, 1>>::call(*j, arguments...)
                                 : Function<Integer<BITS, 2>>::call(*j, arguments...);
    }
  };
  template <class... Arguments>
  static auto call(const Job& j, Arguments... arguments) {
    if (j.format->kind == ZP_CODEBOOK) return Function<Codebook>::call(j, arguments...);
    return by_bits<Of>(j.format->bits, &j, arguments...);
  }
};

template <class Source>
struct ArrangedBytes {
  static size_t call(const Job& j) { return arranged_bytes<Source>(j); }
};
template <class Source>
struct PrepareDot {
  static void call(const Job& j, int64_t m) { prepare_dot<Source>(j, m); }
};
template <class Source>
struct DotIntegerRows {
  static void call(const Job& j, int64_t n0, int64_t n1) { dot_integer_rows<Source>(j, n0, n1); }
};

static size_t prepared_bytes(const Job& j) {
  if (j.tiled) return prepared_gemm_bytes<Floats>(j);
  if (in_integers(j)) return j.m * (OfJob<ArrangedBytes>::call(j) + 2 * sums_bytes(j));
  return j.m * float_stride(j) * 4;
}

static void prepare(const Job& j, int64_t unit) {
  if (j.tiled) return prepare_gemm<Floats>(j, unit);
  if (in_integers(j)) return OfJob<PrepareDot>::call(j, unit);
  prepare_float(j, unit);
}

// Enough weight for a thread to be worth calling, enough chunks for every thread to have work until the end. tile: rows
// whose sums stay in registers.
static int64_t rows_in_tiles(const Job& j, int32_t threads, int64_t tile) {
  int64_t n = j.format->n, share = (n + threads - 1) / threads;
  if (j.tiled) {
    int64_t want = round_up((share + 3) / 4, tile);
    return want < tile ? tile : want > 8 * tile ? 8 * tile : want;
  }
  int64_t enough = (64 << 10) / (j.row_bytes + 1) + 1, want = (share + 3) / 4;
  return want < enough ? (share < enough ? share : enough) : want > 8 * enough ? 8 * enough : want;
}

static int64_t rows(const Job& j, int32_t threads) { return rows_in_tiles(j, threads, TILE_N); }

static size_t scratch_bytes(const Job& j, int64_t rows) {
  if (j.tiled) return rows * (DEPTH + round_up(j.m, TILE_M)) * 4;
  if (in_integers(j)) return 0;
  return round_up(j.format->k, 128) * 4;
}

static void multiply(const Job& j, int64_t n0, int64_t n1, uint8_t* scratch) {
  if (j.tiled) return gemm<Floats>(j, n0, n1, scratch);
  if (in_integers(j)) return OfJob<DotIntegerRows>::call(j, n0, n1);
  dot_float_rows(j, n0, n1, (float*)scratch);
}

// --- ceilings ---

static int64_t read(const uint8_t* data, int64_t bytes) {
  typedef int64_t Words __attribute__((vector_size(W < 4 ? 16 : 4 * W), aligned(1)));
  constexpr int64_t SIZE = sizeof(Words);
  Words sums[4] = {};
  for (int64_t i = 0; i + 4 * SIZE <= bytes; i += 4 * SIZE) {
    unroll<4 * SIZE / 64>([&](auto line) INLINE { fetch<64>(data + i + 64 * line); });
    unroll<4>([&](auto u) INLINE { sums[u] += *(const Words*)(data + i + u * SIZE); });
  }
  sums[0] += sums[1] + sums[2] + sums[3];
  int64_t total = 0;
  for (size_t w = 0; w < SIZE / 8; w++) total += sums[0][w];
  return total;
}

static volatile float peak_sink;  // so that the loops below are not removed

static double peak_float(int64_t repeats) {
  constexpr int CHAINS = 12;
  F acc[CHAINS];
  unroll<CHAINS>([&](auto c) INLINE { acc[c] = set1((float)c); });  // equal chains would become one
  F a = set1(1.0f + peak_sink), b = set1(0.5f);
  for (int64_t i = 0; i < repeats; i++) unroll<CHAINS>([&](auto c) INLINE { acc[c] = fma(a, b, acc[c]); });
  unroll<CHAINS - 1>([&](auto c) INLINE { acc[0] = add(acc[0], acc[c + 1]); });
  peak_sink = sum(acc[0]) * 0.0f;
  return 2.0 * CHAINS * W * (double)repeats;
}
