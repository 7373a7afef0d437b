// Dot for float8: bytes are moved into the place of a float16's sign, exponent and mantissa, whose conversion takes
// subnormals as fast as any other number. (Many processors multiply a subnormal float32 a hundred times slower than
// others.) Included after body.inc.h by an instruction set that also defines
//
//   Words, load_words  2 W words of 16 bits; those of the first `bytes` at a pointer, then 0
//   halves<MANTISSA>   floats of the codes in the lower bytes of the first W words, in their upper bytes, and the same
//                      of the last W
//   Largest            see(words); reaches(magnitude): whether a byte did, but for its sign

static bool is_few_float8(const Job& j) { return !j.tiled && is_float8(*j.format); }

// As a float16 a code of e4m3 is 2^-8 of what it stands for, and its NaN a number; one of e5m2 is that itself.
template <int MANTISSA>
constexpr int UNIT = MANTISSA == 3 ? 8 : 0;

static constexpr int64_t FLOAT8_CHUNK = 4 * W;

// A token: x * 2^UNIT / unit in the order of `halves`, so that no product is subnormal unless it is far below the
// largest; then unit, the power of two at or below the largest |x|.
static inline int64_t float8_stride(const Job& j) { return round_up(j.format->k, 128) + PAD; }

// Where vector t of a chunk has column `lane`.
static inline int64_t column_of(int64_t t, int64_t lane) { return t / 2 * 2 * W + 2 * lane + t % 2; }

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
  int raise = UNIT<MANTISSA> - exponent, half = raise / 2;
  F first = set1(float_of_exponent(half)), second = set1(float_of_exponent(raise - half));
  for (int64_t k = 0; k < padded; k += FLOAT8_CHUNK) {
    for (int i = 0; i < W; i++) {
      for (int t = 0; t < 4; t++) out[k + t * W + i] = x[k + column_of(t, i)];
    }
    for (int t = 0; t < 4; t++) store(out + k + t * W, mul(mul(load(out + k + t * W), first), second));
  }
  out[padded] = float_of_exponent(exponent);
}

static void prepare_few_float8(const Job& j, int64_t m) {
  j.format->kind == ZP_FLOAT8_E4M3FN ? prepare_float8<3>(j, m) : prepare_float8<2>(j, m);
}

static size_t few_float8_prepared_bytes(const Job& j) { return j.m * float8_stride(j) * 4; }

// A row of e4m3 with NaN among its codes.
static float dot_nan(const Job& j, int64_t n, const float* x) {
  const zp_weight w = weight_of(j);
  const uint8_t* p = j.packed + n * j.format->k;
  float total = 0;
  for (int64_t i = 0; i < round_up(j.format->k, FLOAT8_CHUNK); i++) {
    int64_t k = i / FLOAT8_CHUNK * FLOAT8_CHUNK + column_of(i / W % 4, i % W);
    if (k >= j.format->k) continue;
    total += scale_of(w, n, k / j.format->group_size) * (e4m3(p[k]) * float_of_exponent(-UNIT<3>)) * x[i];
  }
  return total;
}

// BLOCKS of activations in a chunk, which takes their factors, or 0 for rows of one scale, applied at the end.
template <int MR, int MANTISSA, int BLOCKS>
static void dot_float8(const Job& j, int64_t m0, int64_t n0, int64_t n1) {
  constexpr int CHUNK = FLOAT8_CHUNK;
  constexpr int SUMS = BLOCKS ? 1 : MR == 1 ? 4 : 2;  // as many chains of sums as hide their latency
  const zp_format& f = *j.format;
  const Blocks blocks(j);
  const Positions<CHUNK> positions(j.block);
  const int64_t stride = float8_stride(j), padded = round_up(f.k, 128), whole = f.k / CHUNK;
  const float* x = (const float*)j.prepared + m0 * stride;
  float* scales = (float*)__builtin_alloca((j.blocks + PAD) * 4);  // of a row
  for (int64_t i = 0; i < j.blocks + PAD; i++) scales[i] = 0;
  Outputs<MR> outputs(j, m0, n0);
  for (int64_t n = n0; n < n1; n++) {
    const uint8_t* p = j.packed + n * f.k;
    F total[MR][SUMS];
    Largest seen;
    unroll<MR>([&](auto r) INLINE { unroll<SUMS>([&](auto u) INLINE { total[r][u] = zero(); }); });
    for (int64_t b = 0; BLOCKS && b < j.blocks; b += W) store(scales + b, blocks.scales(n, b));
    auto use = [&](Words words, int64_t c) INLINE {
      F values[4];
      halves<MANTISSA>(words, values);
      if (MANTISSA == 3) seen.see(words);
      unroll<MR>([&](auto r) INLINE {
        const float* token = x + r * stride + c * CHUNK;
        if constexpr (BLOCKS == 0) {
          unroll<4>([&](auto t)
                        INLINE { total[r][t % SUMS] = fma(values[t], load(token + t * W), total[r][t % SUMS]); });
        } else {
          const float* factor = scales + positions.first(c);
          unroll<BLOCKS>([&](auto b) INLINE {
            constexpr int FIRST = 4 / BLOCKS * b;
            F part = mul(values[FIRST], load(token + FIRST * W));
            unroll<4 / BLOCKS - 1>(
                [&](auto u) INLINE { part = fma(values[FIRST + 1 + u], load(token + (FIRST + 1 + u) * W), part); });
            total[r][0] = fma(part, set1(factor[b]), total[r][0]);
          });
        }
      });
    };
    for (int64_t c = 0; c < whole; c++) {
      fetch<CHUNK>(p + c * CHUNK);
      use(load_words(p + c * CHUNK, CHUNK), c);
    }
    if (f.k % CHUNK) use(load_words(p + whole * CHUNK, f.k % CHUNK), whole);
    float last = BLOCKS ? 1.0f : scale_of(weight_of(j), n, 0);
    unroll<MR>([&](auto r) INLINE {
      const float* token = x + r * stride;
      F all = total[r][0];
      if constexpr (SUMS >= 2) all = add(all, total[r][1]);
      if constexpr (SUMS == 4) all = add(all, add(total[r][2], total[r][3]));
      float y = MANTISSA == 3 && seen.reaches(0x7f) ? dot_nan(j, n, token) : sum(all) * last;
      *outputs.of(r) = y * token[padded];
    });
    outputs.add(1);
  }
}

template <int MR, int BLOCKS>
static void dot_float8_in(const Job& j, int64_t m, int64_t n0, int64_t n1) {
  j.format->kind == ZP_FLOAT8_E4M3FN ? dot_float8<MR, 3, BLOCKS>(j, m, n0, n1)
                                     : dot_float8<MR, 2, BLOCKS>(j, m, n0, n1);
}

template <int MR>
static void dot_float8_of(const Job& j, int64_t m, int64_t n0, int64_t n1) {
  if (j.format->group_size >= j.format->k) return dot_float8_in<MR, 0>(j, m, n0, n1);
  Positions<FLOAT8_CHUNK>(j.block).by_blocks([&](auto blocks) { dot_float8_in<MR, blocks>(j, m, n0, n1); });
}

static void dot_float8_rows(const Job& j, int64_t n0, int64_t n1) {
  int64_t m = 0;
  for (; m + 4 <= j.m; m += 4) dot_float8_of<4>(j, m, n0, n1);
  if (m + 2 <= j.m) dot_float8_of<2>(j, m, n0, n1), m += 2;
  if (m < j.m) dot_float8_of<1>(j, m, n0, n1);
}
