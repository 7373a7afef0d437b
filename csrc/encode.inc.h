// Round to nearest: scales, zero points and codes of a row as zeropoint.numerics chooses them, bit for bit. Included by
// body.inc.h.

static inline double stored_max(int32_t dtype) {
  return dtype == ZP_F16 ? 65504.0 : dtype == ZP_BF16 ? 0x1.fep127 : 0x1.fffffep127;
}

struct Levels {  // of a codebook, in ascending order, with the midpoints between neighbours
  alignas(64) float midpoint[16];
  alignas(16) uint8_t code[16];
  float lowest, highest;

  void sort(const float* levels) {
    float value[16];
    for (int c = 0; c < 16; c++) {
      int at = 0;
      while (at < c && value[at] <= levels[c]) at++;
      for (int i = c; i > at; i--) value[i] = value[i - 1], code[i] = code[i - 1];
      value[at] = levels[c], code[at] = (uint8_t)c;
    }
    for (int i = 0; i < 15; i++) midpoint[i] = (value[i + 1] + value[i]) / 2;
    midpoint[15] = __builtin_inff();
    lowest = value[0], highest = value[15];
  }
};

// --- the range of every group ---

// The least and the greatest of x; 0 times all of them is added to `nothing`, which a NaN or an infinity makes NaN.
static inline void range_of(const float* x, int64_t count, float* low, float* high, F* nothing) {
  *low = *high = x[0];
  int64_t i = 0;
  if (count >= W) {
    F least = load(x), most = least;
    for (; i + 2 * W <= count; i += 2 * W) {
      F a = load(x + i), b = load(x + i + W);
      least = min(least, min(a, b)), most = max(most, max(a, b));
      nothing[0] = fma(a, zero(), nothing[0]), nothing[1] = fma(b, zero(), nothing[1]);
    }
    if (i + W <= count) {
      F a = load(x + i);
      least = min(least, a), most = max(most, a), nothing[0] = fma(a, zero(), nothing[0]), i += W;
    }
    *low = smallest(least), *high = highest(most);
  }
  for (; i < count; i++) {
    nothing[0] = fma(set1(x[i]), zero(), nothing[0]);
    *low = x[i] < *low ? x[i] : *low, *high = x[i] > *high ? x[i] : *high;
  }
}

// --- scales and zero points: in double precision, of LANES groups at a time ---

static constexpr int LANES = W > 1 ? W / 2 : 1;
typedef float Singles __attribute__((vector_size(4 * LANES), aligned(4)));
typedef double Doubles __attribute__((vector_size(8 * LANES)));
typedef int64_t Longs __attribute__((vector_size(8 * LANES)));

static inline Doubles all(double v) { return v - Doubles{}; }
static inline Doubles widened(const float* p) { return __builtin_convertvector(*(const Singles*)p, Doubles); }
static inline Doubles greater_of(Doubles a, Doubles b) { return a > b ? a : b; }

// The smallest numbers of `dtype` at or above `scale` and the dtype's floor. 0 <= scale <= stored_max(dtype)
static inline INLINE Singles scale_up(Doubles scale, int32_t dtype) {
  int64_t digits = dtype == ZP_F16 ? 11 : dtype == ZP_BF16 ? 8 : 24, lowest = dtype == ZP_F16 ? -14 : -126;
  scale = greater_of(scale, all(dtype == ZP_F16 ? 0x1p-24 : 0x1p-126));
  Longs bits = (Longs)scale, exponent = (bits >> 52) - 1023, subnormal = lowest - exponent;
  Longs below = ((Longs{} + 1) << (53 - digits + (subnormal > 0 ? subnormal : 0))) - 1;
  return __builtin_convertvector((Doubles)((bits + below) & ~below), Singles);
}

struct Grids {  // of the groups of a row
  float *scale, *zero_point;
  bool fit;  // the scales are numbers of their dtype
};

static inline void asymmetric_grids(const zp_format& f, const float* low, const float* high, int64_t groups,
                                    Grids& grids) {
  double limit = stored_max(f.scale_dtype);
  Doubles levels = all((1 << f.bits) - 1), q_min = all(-(1 << (f.bits - 1)));
  for (int64_t g = 0; g < groups; g += LANES) {
    Doubles least = widened(low + g), most = widened(high + g);
    Doubles r_min = -greater_of(-least, Doubles{}), r_max = greater_of(most, Doubles{}), spread = r_max - r_min;
    Doubles magnitude = greater_of(most, -most);
    Longs constant = (least == most) & (most != 0) & (magnitude <= limit);  // and so exact
    Doubles wanted = constant ? magnitude : spread > 0 ? spread / levels : all(1);
    for (int l = 0; l < LANES; l++) grids.fit &= wanted[l] <= limit;
    Singles scale = scale_up(wanted, f.scale_dtype);
    Doubles zero_point = q_min - r_min / __builtin_convertvector(scale, Doubles);
    zero_point = (zero_point + 0x1.8p52) - 0x1.8p52;  // to the nearest integer
    *(Singles*)(grids.scale + g) = scale;
    *(Singles*)(grids.zero_point + g) = __builtin_convertvector(constant ? Doubles{} : zero_point, Singles);
  }
}

// below, above: how far the grid reaches at scale 1.
static inline void symmetric_grids(const zp_format& f, const float* x, const float* low, const float* high,
                                   int64_t groups, double below, double above, Grids& grids) {
  double limit = stored_max(f.scale_dtype);
  Doubles of_zeros = all(f.kind == ZP_CODEBOOK ? 0.0 : 1.0);
  for (int64_t g = 0; g < groups; g += LANES) {
    Doubles least = widened(low + g), most = widened(high + g), magnitude = greater_of(-least, most);
    Doubles wanted = magnitude > 0 ? greater_of(-least / below, most / above) : of_zeros;
    for (int l = 0; l < LANES && g + l < groups; l++) {  // a group of one magnitude is exact
      bool one = below >= 1 && above >= 1 && magnitude[l] > 0 && magnitude[l] <= limit;
      const float* group = x + (g + l) * f.group_size;
      float only = (float)magnitude[l];
      for (int64_t i = 0; one && i < f.group_size; i++) one = group[i] == 0 || __builtin_fabsf(group[i]) == only;
      if (one) wanted[l] = magnitude[l];
      grids.fit &= wanted[l] <= limit;
    }
    *(Singles*)(grids.scale + g) = scale_up(wanted, f.scale_dtype);
    *(Singles*)(grids.zero_point + g) = Singles{};
  }
}

// --- codes ---

static inline void integer_codes(const zp_format& f, float scale, float zero_point, const float* x, int64_t count,
                                 uint8_t* codes) {
  constexpr float ROUND = 0x1.8p23f;  // added to a number it rounds it to the nearest integer, ties to even
  float shift = zero_point + (float)(1 << (f.bits - 1)), top = (float)((1 << f.bits) - 1);
  F divisor = set1(scale), minus_divisor = set1(-scale), inverse = set1(1.0f / scale), back = set1(shift - ROUND);
  auto put = [&](F ratio, uint8_t* to)
                 INLINE { store_u8(to, min(max(add(add(ratio, set1(ROUND)), back), zero()), set1(top))); };
  int64_t i = 0;
  if (scale > 0x1p-60f && scale < 0x1p60f) {  // only quotients below 1/4 have subnormal remainders
    for (; i + W <= count; i += W) put(quotient(load(x + i), divisor, minus_divisor, inverse), codes + i);
  } else {
    for (; i + W <= count; i += W) put(div(load(x + i), divisor), codes + i);
  }
  for (; i < count; i++) {
    float code = __builtin_rintf(x[i] / scale) + shift;
    codes[i] = (uint8_t)(code < 0 ? 0 : code > top ? top : code);
  }
}

static inline void codebook_codes(const Levels& levels, float scale, const float* x, int64_t count, uint8_t* codes) {
  float reciprocal = 1.0f / scale;
  F factor = set1(reciprocal);
  int64_t i = 0;
  for (; i + W <= count; i += W) store_nearest16(codes + i, mul(load(x + i), factor), levels.midpoint, levels.code);
  for (; i < count; i++) {
    int index = 0;
    for (int l = 0; l < 15; l++) index += x[i] * reciprocal > levels.midpoint[l];
    codes[i] = levels.code[index];
  }
}

static int encode(const zp_format& f, const void* weight, int32_t dtype, int64_t row, uint8_t* packed, void* scale,
                  int8_t* zero_point) {
  int64_t k = f.k, size = f.group_size, groups = k / size, padded = round_up(groups, W);
  int64_t value_bytes = dtype == ZP_F32 ? 4 : 2;
  const float* x = (const float*)weight + (dtype == ZP_F32 ? row * k : 0);
  if (dtype != ZP_F32) {
    float* wide = (float*)__builtin_alloca(k * 4);
    to_f32((const uint16_t*)weight + row * k, dtype, k, wide);
    x = wide;
  }
  uint8_t* codes = (uint8_t*)__builtin_alloca(k + 64);
  float* low = (float*)__builtin_alloca(4 * padded * sizeof(float));
  float* high = low + padded;
  Grids grids = {high + padded, high + 2 * padded, true};
  F nothing[2] = {zero(), zero()}, magnitude = zero();
  for (int64_t g = 0; g < groups; g++) range_of(x + g * size, size, low + g, high + g, nothing);
  for (int64_t g = groups; g < padded; g++) low[g] = high[g] = 0;
  for (int64_t g = 0; g < padded; g += W) magnitude = max(magnitude, max(load(high + g), sub(zero(), load(low + g))));
  // From half of the dtype's range on, the grid's end may lie beyond it: left to zeropoint.numerics.
  if (!(sum(add(nothing[0], nothing[1])) == 0) || highest(magnitude) >= (float)(stored_max(dtype) / 2)) {
    return ZP_BAD_ARGUMENT;
  }
  Levels levels;
  bool codebook = f.kind == ZP_CODEBOOK;
  if (codebook) levels.sort(f.levels);
  if (zero_point) {
    asymmetric_grids(f, low, high, groups, grids);
    for (int64_t g = 0; g < groups; g++) zero_point[row * f.scale_stride + g] = (int8_t)grids.zero_point[g];
  } else {
    double reach = (double)((1 << (f.bits - 1)) - 1);
    symmetric_grids(f, x, low, high, groups, codebook ? -levels.lowest : reach, codebook ? levels.highest : reach,
                    grids);
  }
  if (!grids.fit) return ZP_BAD_ARGUMENT;
  from_f32(grids.scale, f.scale_dtype, groups,  // exact: they are numbers of the dtype
           (uint8_t*)scale + row * f.scale_stride * (f.scale_dtype == ZP_F32 ? 4 : 2));
  const uint8_t* next = (const uint8_t*)weight + (row + 1) * k * value_bytes;
  for (int64_t g = 0; g < groups; g++) {
    for (int64_t at = 0; at < size * value_bytes; at += 64) __builtin_prefetch(next + g * size * value_bytes + at);
    if (codebook) {
      codebook_codes(levels, grids.scale[g], x + g * size, size, codes + g * size);
    } else {
      integer_codes(f, grids.scale[g], grids.zero_point[g], x + g * size, size, codes + g * size);
    }
  }
  pack(codes, f.bits, k, packed + row * packed_row_bytes(f));
  return ZP_OK;
}
