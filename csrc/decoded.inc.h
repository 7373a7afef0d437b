// Dot for 16-entry codebooks and float8: codes become floats in registers. Included after body.inc.h by an instruction
// set that also defines
//
//   Words, load_words        W words of 32 bits; those of the first `bytes` at a pointer, then 0
//   Codebook                 16 levels in registers; each(words, use): use(v, levels) for the 8 vectors v of a chunk of
//                            8 W codes; column(v, i): the column of lane i of vector v. Lane i belongs to columns
//                            [8 i', 8 i' + 32), i' = i / 4 * 4, so that groups of 32 have lanes of their own
//   load_e4m3_small          W values, 2^-8 of what they are; 480 * 2^-8 for a NaN
//   NaNs                     see(p): whether one of 2 W codes of e4m3 is a NaN; any()

static constexpr int64_t CODEBOOK_CHUNK = 8 * W;

static bool is_decoded(const Job& j) {
  return !j.tiled &&
         (j.format->kind == ZP_CODEBOOK || j.format->kind == ZP_FLOAT8_E4M3FN || j.format->kind == ZP_FLOAT8_E5M2);
}

static size_t decoded_scratch_bytes(const Job& j) { return 4 * (round_up(j.blocks, W) + PAD); }

static void prepare_decoded(const Job& j, int64_t m) {
  if (j.format->kind != ZP_CODEBOOK) return prepare_float(j, m);
  int64_t stride = float_stride(j);
  float* x = (float*)__builtin_alloca(stride * 4);
  float* out = (float*)j.prepared + m * stride;
  read_token(j, m, stride, x);
  for (int64_t k = 0; k < stride; k += CODEBOOK_CHUNK) {
    for (int v = 0; v < 8; v++) {
      for (int i = 0; i < W; i++) out[k + v * W + i] = x[k + Codebook::column(v, i)];
    }
  }
}

template <int MR>
static void dot_codebook(const Job& j, int64_t m0, int64_t n0, int64_t n1, float* scale) {
  const zp_format& f = *j.format;
  const zp_weight w = weight_of(j);
  alignas(64) float own[16];
  const bool by_row = f.group_size >= f.k;
  const Blocks blocks(j);
  const Integer::Lanes<4> lanes(j.block);  // as those of the sums of a 4-bit chunk
  int64_t chunks = (f.k + CODEBOOK_CHUNK - 1) / CODEBOOK_CHUNK, stride = float_stride(j);
  const float* x = (const float*)j.prepared + m0 * stride;
  Codebook levels(levels_of(w, n0, own));
  for (int64_t n = n0; n < n1; n++) {
    const uint8_t* p = j.packed + n * j.row_bytes;
    if (w.levels) levels = Codebook(levels_of(w, n, own));
    for (int64_t b = 0; !by_row && b < j.blocks; b += W) store(scale + b, blocks.scales(n, b));
    F total[MR];
    unroll<MR>([&](auto r) INLINE { total[r] = zero(); });
    for (int64_t c = 0; c < chunks; c++) {
      Words words = load_words(p + 4 * W * c, j.row_bytes - 4 * W * c);
      __builtin_prefetch(p + 4 * W * c + AHEAD);
      F part[MR];
      unroll<MR>([&](auto r) INLINE { part[r] = zero(); });
      levels.each(words, [&](auto v, F values) INLINE {
        unroll<MR>([&](auto r)
                       INLINE { part[r] = fma(values, load(x + r * stride + c * CODEBOOK_CHUNK + W * v), part[r]); });
      });
      F factor = by_row ? set1(1.0f) : lanes.scales(scale, c);
      unroll<MR>([&](auto r) INLINE { total[r] = fma(part[r], factor, total[r]); });
    }
    unroll<MR>([&](auto r) INLINE { put(j, m0 + r, n, sum(total[r]) * (by_row ? scale_of(w, n, 0) : 1.0f)); });
  }
}

template <int MR, bool E4M3>
static void dot_float8(const Job& j, int64_t m0, int64_t n0, int64_t n1, float* scale) {
  const zp_format& f = *j.format;
  const zp_weight w = weight_of(j);
  const bool by_row = f.group_size >= f.k;
  const Blocks blocks(j);
  int64_t stride = float_stride(j), step = by_row ? f.k : j.block;
  const float* x = (const float*)j.prepared + m0 * stride;
  for (int64_t n = n0; n < n1; n++) {
    const uint8_t* p = j.packed + n * f.k;
    for (int64_t b = 0; !by_row && b < j.blocks; b += W) store(scale + b, blocks.scales(n, b));
    F total[MR];
    NaNs nans;
    unroll<MR>([&](auto r) INLINE { total[r] = zero(); });
    for (int64_t k0 = 0; k0 < f.k; k0 += step) {
      F part[2][MR];
      unroll<MR>([&](auto r) INLINE { part[0][r] = part[1][r] = zero(); });
      for (int64_t k = k0; k < k0 + step; k += 2 * W) {
        alignas(64) uint8_t tail[2 * W];
        const uint8_t* c = p + k;
        if (f.k - k < 2 * W) {
          __builtin_memset(tail, 0, sizeof(tail));
          __builtin_memcpy(tail, c, f.k - k);
          c = tail;
        }
        if constexpr (E4M3) nans.see(c);
        unroll<2>([&](auto h) INLINE {
          F values = E4M3 ? load_e4m3_small(c + W * h) : load_e5m2(c + W * h);
          unroll<MR>([&](auto r) INLINE { part[h][r] = fma(values, load(x + r * stride + k + W * h), part[h][r]); });
        });
      }
      F factor = set1(by_row ? 1.0f : scale[k0 / step]);
      unroll<MR>([&](auto r) INLINE { total[r] = fma(add(part[0][r], part[1][r]), factor, total[r]); });
    }
    float last = (by_row ? scale_of(w, n, 0) : 1.0f) * (E4M3 ? 256.0f : 1.0f);
    unroll<MR>([&](auto r) INLINE { put(j, m0 + r, n, nans.any() ? __builtin_nanf("") : sum(total[r]) * last); });
  }
}

template <int MR>
static void dot_decoded(const Job& j, int64_t m, int64_t n0, int64_t n1, float* scratch) {
  if (j.format->kind == ZP_CODEBOOK) return dot_codebook<MR>(j, m, n0, n1, scratch);
  if (j.format->kind == ZP_FLOAT8_E4M3FN) return dot_float8<MR, true>(j, m, n0, n1, scratch);
  dot_float8<MR, false>(j, m, n0, n1, scratch);
}

static void dot_decoded_rows(const Job& j, int64_t n0, int64_t n1, float* scratch) {
  int64_t m = 0;
  for (; m + 4 <= j.m; m += 4) dot_decoded<4>(j, m, n0, n1, scratch);
  if (m + 2 <= j.m) dot_decoded<2>(j, m, n0, n1, scratch), m += 2;
  if (m < j.m) dot_decoded<1>(j, m, n0, n1, scratch);
}
