// Dot for float8: codes become floats in registers. Included after body.inc.h by an instruction set that also defines
//
//   load_e4m3_small   W values, 2^-8 of what they are; 480 * 2^-8 for a NaN
//   NaNs              see(p): whether one of 2 W codes of e4m3 is a NaN; any()

static bool is_decoded(const Job& j) {
  return !j.tiled && (j.format->kind == ZP_FLOAT8_E4M3FN || j.format->kind == ZP_FLOAT8_E5M2);
}

static size_t decoded_scratch_bytes(const Job& j) { return 4 * (round_up(j.blocks, W) + PAD); }

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
  if (j.format->kind == ZP_FLOAT8_E4M3FN) return dot_float8<MR, true>(j, m, n0, n1, scratch);
  dot_float8<MR, false>(j, m, n0, n1, scratch);
}

static void dot_decoded_rows(const Job& j, int64_t n0, int64_t n1, float* scratch) {
  int64_t m = 0;
  for (; m + 4 <= j.m; m += 4) dot_decoded<4>(j, m, n0, n1, scratch);
  if (m + 2 <= j.m) dot_decoded<2>(j, m, n0, n1, scratch), m += 2;
  if (m < j.m) dot_decoded<1>(j, m, n0, n1, scratch);
}
