// Dot for float8: bytes of a word of 32 bits are shifted into the place of a float32's sign, exponent and mantissa.
// Included after body.inc.h by an instruction set that also defines
//
//   Words, load_words    W words of 32 bits; those of the first `bytes` at a pointer, then 0
//   shifted<LEFT, RIGHT> words moved LEFT, then RIGHT with their sign, and masked, as floats
//   Largest              see(words); reaches(magnitude): whether a byte did, but for its sign

static bool is_few_float8(const Job& j) { return !j.tiled && is_float8(*j.format); }

// As a float32, a code of float8 is 2^(bias - 127) of what it stands for, subnormals included.
template <int MANTISSA>
struct Float8 {
  static constexpr int UPPER = 7 - MANTISSA;             // bits of the exponent
  static constexpr int UNIT = 128 - (1 << (UPPER - 1));  // 127 - bias
  static constexpr uint32_t MASK = 0x80000000u | 0x7fu << (23 - MANTISSA);
  static constexpr int SPECIAL = MANTISSA == 3 ? 0x7f : 0x7c;  // the first magnitude that is NaN or Inf
  static inline float value(uint8_t c) { return MANTISSA == 3 ? e4m3(c) : scalar_f16((uint16_t)(c << 8)); }
};

static constexpr int64_t FLOAT8_CHUNK = 4 * W;

// A token: x * 2^UNIT / unit, four columns apart, so that no product is subnormal unless it is far below the largest;
// then unit, the power of two at or below the largest |x|.
static inline int64_t float8_stride(const Job& j) { return round_up(j.format->k, 128) + PAD; }

static inline float float_of_exponent(int exponent) {  // -126 .. 127
  uint32_t bits = (uint32_t)(exponent + 127) << 23;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

template <int MANTISSA>
static void prepare_float8(const Job& j, int64_t m) {
  int64_t padded = round_up(j.format->k, 128);
  float* x = (float*)__builtin_alloca(padded * 4);
  float* out = (float*)j.prepared + m * float8_stride(j);
  read_token(j, m, padded, x);
  F top = zero();
  for (int64_t i = 0; i < padded; i += W) top = abs_max(top, load(x + i));
  float amax = largest(top);
  uint32_t bits;
  __builtin_memcpy(&bits, &amax, 4);
  int exponent = (int)(bits >> 23 & 255) - 127;
  exponent = exponent < -126 ? -126 : exponent > 127 ? 127 : exponent;
  int raise = Float8<MANTISSA>::UNIT - exponent, half = raise / 2;
  F first = set1(float_of_exponent(half)), second = set1(float_of_exponent(raise - half));
  for (int64_t k = 0; k < padded; k += FLOAT8_CHUNK) {
    for (int i = 0; i < W; i++) {
      for (int t = 0; t < 4; t++) out[k + t * W + i] = x[k + 4 * i + t];
    }
    for (int t = 0; t < 4; t++) store(out + k + t * W, mul(mul(load(out + k + t * W), first), second));
  }
  out[padded] = float_of_exponent(exponent);
}

static void prepare_few_float8(const Job& j, int64_t m) {
  j.format->kind == ZP_FLOAT8_E4M3FN ? prepare_float8<3>(j, m) : prepare_float8<2>(j, m);
}

static size_t few_float8_prepared_bytes(const Job& j) { return j.m * float8_stride(j) * 4; }

// A row with NaN or Inf among its codes.
template <int MANTISSA>
static float dot_special(const Job& j, int64_t n, const float* x) {
  const zp_weight w = weight_of(j);
  const uint8_t* p = j.packed + n * j.format->k;
  float total = 0;
  for (int64_t k = 0; k < j.format->k; k++) {
    float weight = Float8<MANTISSA>::value(p[k]) * float_of_exponent(-Float8<MANTISSA>::UNIT);
    total += scale_of(w, n, k / j.format->group_size) * weight *
             x[k / FLOAT8_CHUNK * FLOAT8_CHUNK + k % 4 * W + k % FLOAT8_CHUNK / 4];
  }
  return total;
}

// EACH: every chunk has factors of its own.
template <int MR, int MANTISSA, bool EACH>
static void dot_float8(const Job& j, int64_t m0, int64_t n0, int64_t n1) {
  using Format = Float8<MANTISSA>;
  constexpr int CHUNK = FLOAT8_CHUNK, SUMS = MR == 1 ? 4 : 2;  // as many chains of sums as hide their latency
  const zp_format& f = *j.format;
  const bool by_row = !EACH && f.group_size >= f.k;  // one scale: applied at the end
  const Blocks blocks(j);
  const LanesOf<CHUNK> lanes(j.block);
  const int64_t stride = float8_stride(j), padded = round_up(f.k, 128), whole = f.k / CHUNK;
  const int64_t span = EACH ? 1 : by_row ? whole : j.block / CHUNK;  // chunks that share their factors
  const float* x = (const float*)j.prepared + m0 * stride;
  float* scales = (float*)__builtin_alloca((j.blocks + PAD) * 4);  // of a row
  for (int64_t i = 0; i < j.blocks + PAD; i++) scales[i] = by_row ? 1.0f : 0.0f;
  Outputs<MR> outputs(j, m0, n0);
  for (int64_t n = n0; n < n1; n++) {
    const uint8_t* p = j.packed + n * f.k;
    F total[MR], part[MR][SUMS];
    Largest seen;
    unroll<MR>([&](auto r) INLINE { total[r] = zero(); });
    auto use = [&](Words words, int64_t c) INLINE {
      seen.see(words);
      unroll<4>([&](auto t) INLINE {
        F values = shifted<24 - 8 * t, 8 - Format::UPPER>(words, Format::MASK);
        unroll<MR>([&](auto r) INLINE {
          F token = load(x + r * stride + c * CHUNK + t * W);
          part[r][t % SUMS] = fma(values, token, part[r][t % SUMS]);
        });
      });
    };
    for (int64_t b = 0; b < j.blocks && !by_row; b += W) store(scales + b, blocks.scales(n, b));
    for (int64_t c0 = 0; c0 * CHUNK < f.k; c0 += span) {
      unroll<MR>([&](auto r) INLINE { unroll<SUMS>([&](auto u) INLINE { part[r][u] = zero(); }); });
      int64_t end = c0 + span < whole ? c0 + span : whole;
      for (int64_t c = c0; c < end; c++) {
        fetch<CHUNK>(p + c * CHUNK);
        use(load_words(p + c * CHUNK, CHUNK), c);
        if (EACH) break;
      }
      if ((by_row || c0 + span > whole) && f.k % CHUNK) use(load_words(p + whole * CHUNK, f.k % CHUNK), whole);
      F factor = lanes.template take<EACH ? LanesOf<CHUNK>::MOST : 1>(scales + lanes.first(c0));
      unroll<MR>([&](auto r) INLINE {
        F both = add(part[r][0], part[r][1]);
        if constexpr (SUMS == 4) both = add(both, add(part[r][2], part[r][3]));
        total[r] = fma(both, factor, total[r]);
      });
      if (by_row) break;
    }
    float last = by_row ? scale_of(weight_of(j), n, 0) : 1.0f;
    unroll<MR>([&](auto r) INLINE {
      const float* token = x + r * stride;
      float y = seen.reaches(Format::SPECIAL) ? dot_special<MANTISSA>(j, n, token) : sum(total[r]) * last;
      *outputs.of(r) = y * token[padded];
    });
    outputs.add(1);
  }
}

template <int MR>
static void dot_float8_of(const Job& j, int64_t m, int64_t n0, int64_t n1) {
  bool each = j.format->group_size < j.format->k && j.block <= FLOAT8_CHUNK;
  if (j.format->kind == ZP_FLOAT8_E4M3FN) {
    each ? dot_float8<MR, 3, true>(j, m, n0, n1) : dot_float8<MR, 3, false>(j, m, n0, n1);
  } else {
    each ? dot_float8<MR, 2, true>(j, m, n0, n1) : dot_float8<MR, 2, false>(j, m, n0, n1);
  }
}

static void dot_float8_rows(const Job& j, int64_t n0, int64_t n1) {
  int64_t m = 0;
  for (; m + 4 <= j.m; m += 4) dot_float8_of<4>(j, m, n0, n1);
  if (m + 2 <= j.m) dot_float8_of<2>(j, m, n0, n1), m += 2;
  if (m < j.m) dot_float8_of<1>(j, m, n0, n1);
}
