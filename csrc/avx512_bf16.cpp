// AVX512 with BF16 and VBMI (Zen 4 and later): bfloat16 tokens as pairs of columns, two products in one instruction,
// on Zen for every format, but not for few tokens of an integer one; everything else as AVX512 does it. The scale is
// folded into bfloat16 weights, as AMX does it.
#include <immintrin.h>

#include "kernels.h"
#include "unroll.h"

namespace zp {
namespace {
#include "avx512.inc.h"
#include "bfloat16.inc.h"

struct Pairs {
  static constexpr int64_t COLUMNS = 2;
  static inline F mac(F weight, F token, F acc) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(weight), (__m512bh)_mm512_castps_si512(token));
  }
  static inline void token(const Job& j, int64_t m, int64_t padded, float* words) {
    __builtin_memset(words, 0, padded * 2);
    __builtin_memcpy(words, x_row(j, m), j.format->k * 2);
  }
  static inline void decode(const zp_weight& w, int64_t row, int64_t k0, int64_t k1, float* words) {
    decode_bfloat16(w, row, k0, k1, true, (uint16_t*)words);
  }
};
static_assert(DEPTH * Pairs::COLUMNS <= MOST, "decoded in one call");

// A few tokens of float8 with one scale a row: bfloat16 holds the values exactly, and the sum takes the scale.
bool used_at_once(const Job& j) { return j.m < 12 && is_float8(*j.format) && scaled_by_row(*j.format); }

// Zen multiplies pairs as fast as single float32, Golden Cove takes four times as long: there integers and float32 are
// faster, but for a row of bfloat16 that is used as it lies.
bool pairs_are_fast() { return __builtin_cpu_is("amd"); }

bool in_pairs(const Job& j) {
  if (j.x_dtype != ZP_BF16 || j.int8_activations) return false;
  if (!pairs_are_fast()) return !j.tiled && j.format->kind == ZP_BFLOAT16;
  return j.tiled || j.format->kind == ZP_BFLOAT16 || used_at_once(j) || (!is_integer(j) && j.m >= 3);
}

// --- few tokens: a few rows are decoded and used at once ---

constexpr int PAIRS_N = 4;  // rows times 4 tokens whose sums stay in registers

int64_t pairs_stride(const Job& j) { return round_up(j.format->k, 2 * W) / 2; }  // words of a token or a row

template <int NR, int MR>
void dot_pairs(const Job& j, int64_t m0, int64_t n, const float* rows) {
  int64_t stride = pairs_stride(j);
  const float* x = (const float*)j.prepared + m0 * stride;
  F acc[NR][MR];
  unroll<NR>([&](auto i) INLINE { unroll<MR>([&](auto r) INLINE { acc[i][r] = zero(); }); });
  for (int64_t k = 0; k < stride; k += W) {
    F tokens[MR];
    unroll<MR>([&](auto r) INLINE { tokens[r] = load(x + r * stride + k); });
    unroll<NR>([&](auto i) INLINE {
      F weight = load(rows + i * stride + k);
      unroll<MR>([&](auto r) INLINE { acc[i][r] = Pairs::mac(weight, tokens[r], acc[i][r]); });
    });
  }
  unroll<MR>([&](auto r) INLINE {
    float y[NR];
    unroll<NR>([&](auto i) INLINE { y[i] = sum(acc[i][r]); });
    put(j, m0 + r, n, y, NR);
  });
}

// The same of a row of float8, which is used as it is decoded.
template <int MR>
void dot_float8_pairs(const Job& j, int64_t m0, int64_t n, const Float8Words& decode) {
  int64_t k = j.format->k, stride = pairs_stride(j);
  const uint8_t* p = j.packed + n * k;
  const float* x = (const float*)j.prepared + m0 * stride;
  F acc[MR][2];
  __m512i words[2];
  unroll<MR>([&](auto r) INLINE { acc[r][0] = acc[r][1] = zero(); });
  for (int64_t i = 0; i < k; i += 64) {
    fetch<64>(p + i);
    decode(p + i, k - i, words);
    bool both = k - i > 32;
    unroll<MR>([&](auto r) INLINE {
      acc[r][0] = Pairs::mac(_mm512_castsi512_ps(words[0]), load(x + r * stride + i / 2), acc[r][0]);
      if (both) acc[r][1] = Pairs::mac(_mm512_castsi512_ps(words[1]), load(x + r * stride + i / 2 + W), acc[r][1]);
    });
  }
  float scale = scale_of(weight_of(j), n, 0);
  unroll<MR>([&](auto r) INLINE { put(j, m0 + r, n, scale * sum(add(acc[r][0], acc[r][1]))); });
}

template <int NR>
void dot_pairs_tokens(const Job& j, int64_t n, const float* rows) {
  int64_t m = 0;
  for (; m + 4 <= j.m; m += 4) dot_pairs<NR, 4>(j, m, n, rows);
  if (m + 2 <= j.m) dot_pairs<NR, 2>(j, m, n, rows), m += 2;
  if (m < j.m) dot_pairs<NR, 1>(j, m, n, rows);
}

void dot_pairs_rows(const Job& j, int64_t n0, int64_t n1, float* lines) {
  constexpr int64_t COLUMNS = DEPTH * Pairs::COLUMNS;
  const zp_weight w = weight_of(j);
  int64_t k = j.format->k, stride = pairs_stride(j);
  if (used_at_once(j)) {
    const Float8Words decode(*j.format);
    for (int64_t n = n0; n < n1; n++) {
      int64_t m = 0;
      for (; m + 4 <= j.m; m += 4) dot_float8_pairs<4>(j, m, n, decode);
      if (m + 2 <= j.m) dot_float8_pairs<2>(j, m, n, decode), m += 2;
      if (m < j.m) dot_float8_pairs<1>(j, m, n, decode);
    }
    return;
  }
  bool as_it_lies = j.format->kind == ZP_BFLOAT16 && k % (2 * W) == 0;
  for (int64_t n = n0; n < n1; n += PAIRS_N) {
    int64_t count = n1 - n < PAIRS_N ? n1 - n : PAIRS_N;
    const float* rows = as_it_lies ? (const float*)(j.packed + n * j.row_bytes) : lines;
    for (int64_t i = 0; !as_it_lies && i < count; i++) {
      for (int64_t k0 = 0; k0 < k; k0 += COLUMNS) {
        Pairs::decode(w, n + i, k0, k0 + COLUMNS < k ? k0 + COLUMNS : k, lines + i * stride + k0 / 2);
      }
    }
    if (count == PAIRS_N) {
      dot_pairs_tokens<PAIRS_N>(j, n, rows);
    } else {
      for (int64_t i = 0; i < count; i++) dot_pairs_tokens<1>(j, n + i, rows + i * stride);
    }
  }
}

// --- the table ---

bool tile_pairs(const Job& j) {
  if (j.x_dtype != ZP_BF16 || j.int8_activations || !pairs_are_fast()) return tile512(j);
  return j.m >= (is_float8(*j.format) ? 12 : 32);
}

int64_t tokens_pairs(const Job& j) { return !in_pairs(j) ? tokens_vector(j) : j.tiled ? TILE_M : 1; }

size_t prepared_bytes_pairs(const Job& j) {
  if (!in_pairs(j)) return prepared_bytes_vector(j);
  return j.tiled ? prepared_gemm_bytes<Pairs>(j) : j.m * pairs_stride(j) * 4;
}

void prepare_pairs(const Job& j, int64_t unit) {
  if (!in_pairs(j)) return prepare_vector(j, unit);
  if (j.tiled) return prepare_gemm<Pairs>(j, unit);
  Pairs::token(j, unit, 2 * pairs_stride(j), (float*)j.prepared + unit * pairs_stride(j));
}

size_t scratch_bytes_pairs(const Job& j, int64_t rows) {
  if (!in_pairs(j)) return scratch_bytes_vector(j, rows);
  return j.tiled ? scratch_bytes(j, rows) : PAIRS_N * pairs_stride(j) * 4;
}

void multiply_pairs(const Job& j, int64_t n0, int64_t n1, uint8_t* scratch) {
  if (!in_pairs(j)) return multiply_vector(j, n0, n1, scratch);
  j.tiled ? gemm<Pairs>(j, n0, n1, scratch) : dot_pairs_rows(j, n0, n1, (float*)scratch);
}

double peak_pairs(int32_t what, int64_t repeats) {
  if (what != ZP_PEAK_BFLOAT16) return peak512(what, repeats);
  constexpr int CHAINS = 12;
  F acc[CHAINS], a = _mm512_castsi512_ps(_mm512_set1_epi32(0x3f803f80 + (int)peak_sink));
  unroll<CHAINS>([&](auto c) INLINE { acc[c] = set1((float)c); });
  for (int64_t i = 0; i < repeats; i++) unroll<CHAINS>([&](auto c) INLINE { acc[c] = Pairs::mac(a, a, acc[c]); });
  unroll<CHAINS - 1>([&](auto c) INLINE { acc[0] = add(acc[0], acc[c + 1]); });
  peak_sink = sum(acc[0]) * 0.0f;
  return 2.0 * 2 * CHAINS * W * (double)repeats;
}

}  // namespace

extern const Isa avx512_bf16;
const Isa avx512_bf16 = {"avx512_bf16",
                         tile_pairs,
                         tokens_pairs,
                         prepared_bytes_pairs,
                         prepare_pairs,
                         rows,
                         scratch_bytes_pairs,
                         multiply_pairs,
                         decode,
                         encode,
                         normalize,
                         gate,
                         rotate,
                         attend,
                         nullptr,
                         read,
                         peak_pairs};

}  // namespace zp
