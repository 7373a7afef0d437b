// AVX512 with BF16 and VBMI (Zen 4 and later): bfloat16 tokens as pairs of columns, two products in one instruction,
// for every format, but not for few tokens of an integer one; everything else as AVX512 does it. The scale is folded
// into bfloat16 weights, as AMX does it.
#include <immintrin.h>

#include "kernels.h"
#include "unroll.h"

namespace zp {
namespace {
#include "avx512.inc.h"

// The 128 magnitudes of a float8, exactly, as the upper and the lower bytes of bfloat16.
struct Float8Table {
  alignas(64) uint8_t upper[128];
  alignas(64) uint8_t lower[128];
};

constexpr Float8Table make_float8(int mantissa_bits, int bias, bool has_infinity) {
  Float8Table table = {};
  for (int c = 0; c < 128; c++) {
    int exponent = c >> mantissa_bits, mantissa = c & ((1 << mantissa_bits) - 1), steps = 0;
    bool top = exponent == (127 >> mantissa_bits), is_nan = has_infinity ? top && mantissa : c == 127;
    if (exponent == 0) {  // a subnormal, which bfloat16 has as a normal number
      while (mantissa && !(mantissa >> mantissa_bits)) mantissa *= 2, steps++;
      mantissa &= (1 << mantissa_bits) - 1;
      exponent = c ? 1 - steps : bias - 127;
    }
    int bits = (exponent - bias + 127) << 7 | mantissa << (7 - mantissa_bits);
    if (has_infinity && top) bits = 0x7f80;
    if (is_nan) bits = 0x7fc0;
    table.upper[c] = (uint8_t)(bits >> 8), table.lower[c] = (uint8_t)bits;
  }
  return table;
}

bool is_float8(const zp_format& f) { return f.kind == ZP_FLOAT8_E4M3FN || f.kind == ZP_FLOAT8_E5M2; }

struct Float8Words {  // 64 codes -> bfloat16, two vectors of 32
  __m512i upper[2], lower[2];
  explicit Float8Words(const zp_format& f) {
    static constexpr Float8Table e4m3fn = make_float8(3, 7, false), e5m2 = make_float8(2, 15, true);
    const Float8Table& table = f.kind == ZP_FLOAT8_E4M3FN ? e4m3fn : e5m2;
    for (int i = 0; i < 2; i++) {
      upper[i] = _mm512_load_si512(table.upper + 64 * i), lower[i] = _mm512_load_si512(table.lower + 64 * i);
    }
  }
  inline INLINE void operator()(const uint8_t* p, int64_t count, F* words) const {  // past count: zeros
    const __m512i halves = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);               // interleaved, they are in order
    __m512i c = _mm512_permutexvar_epi64(halves, _mm512_maskz_loadu_epi8(first(count), p));
    __m512i sign = _mm512_and_si512(c, _mm512_set1_epi8((char)0x80));
    __m512i high = _mm512_or_si512(_mm512_permutex2var_epi8(upper[0], c, upper[1]), sign);
    __m512i low = _mm512_permutex2var_epi8(lower[0], c, lower[1]);
    words[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi8(low, high));
    words[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi8(low, high));
  }
};

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
    uint16_t* out = (uint16_t*)words;
    if (k1 % 32) __builtin_memset(out + (k1 - k0) / 32 * 32, 0, 64);
    if (w.format->kind == ZP_BFLOAT16) {
      __builtin_memcpy(out, w.packed + (row * w.format->k + k0) * 2, (k1 - k0) * 2);
    } else if (w.format->kind == ZP_INTEGER || w.format->kind == ZP_CODEBOOK) {
      decode_codes(w, row, k0, k1, out);
    } else {
      alignas(64) float line[DEPTH * COLUMNS];
      decode_columns(w, row, k0, k1, line);
      for (int64_t i = k1 - k0; i % (2 * W); i++) line[i] = 0;
      for (int64_t i = 0; i < k1 - k0; i += 2 * W) put_pairs(out + i, load(line + i), load(line + i + W));
    }
  }

  static inline void put_pairs(uint16_t* out, F low, F high) {
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }

  // Of groups [first, first + count) of a row of integers or of a codebook, whose offset is 0; written to whole
  // vectors.
  static inline void grids(const zp_weight& w, int64_t row, int64_t first, int64_t count, float* scale, float* offset) {
    const zp_format& f = *w.format;
    int64_t at = row * f.scale_stride + first;
    F half = f.kind == ZP_INTEGER ? set1((float)(1 << (f.bits - 1))) : zero();
    for (int64_t g = 0; g < count; g += W) {
      int64_t some = count - g < W ? count - g : W;
      if (f.scale_dtype == ZP_F16) {
        store(scale + g, load_f16_part((const uint16_t*)w.scale + at + g, some));
      } else {
        for (int64_t i = 0; i < some; i++) scale[g + i] = read_scale(f, w.scale, at + g + i);
      }
      F zero_point = !w.zero_point        ? zero()
                     : f.float_zero_point ? load_f16_part((const uint16_t*)w.zero_point + at + g, some)
                                          : load_i8_part((const int8_t*)w.zero_point + at + g, some);
      store(offset + g, add(half, zero_point));
    }
  }

  // Groups are whole vectors of 32 codes, but for the last of a row.
  static inline void decode_codes(const zp_weight& w, int64_t row, int64_t k0, int64_t k1, uint16_t* out) {
    constexpr int64_t MOST = DEPTH * COLUMNS;
    const zp_format& f = *w.format;
    alignas(64) float own[16], scales[MOST / 32 + 2 * W], offsets[MOST / 32 + 2 * W];
    alignas(64) uint8_t codes[MOST + 64];
    F levels = _mm512_cvtepi32_ps(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    if (f.kind == ZP_CODEBOOK) levels = load(levels_of(w, row, own));
    const uint8_t* packed = w.packed + row * packed_row_bytes(f) + k0 * f.bits / 8;
    const uint8_t* from = codes;
    if (f.bits == 8 && (k1 - k0) % 32 == 0) {
      from = packed;
    } else if (f.bits != 4) {
      unpack(packed, f.bits, k1 - k0, codes);
    }
    int64_t first_group = k0 / f.group_size, at = 0, count = k1 - k0, end = (first_group + 1) * f.group_size - k0;
    grids(w, row, first_group, (k1 - 1) / f.group_size - first_group + 1, scales, offsets);
    for (int64_t group = 0; at < count; group++, end += f.group_size) {
      if (end > count) end = count;
      F scale = set1(scales[group]), offset = set1(offsets[group]);
      if (f.bits <= 5) {  // all that a code can stand for; up to 16 of it twice: upper bits do not matter
        F low = mul(sub(levels, offset), scale), high = low;
        if (f.bits == 5) high = mul(sub(add(levels, set1(16)), offset), scale);
        __m512i table = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        for (; at < end; at += 32) {
          __m512i index;
          if (f.bits == 4) {
            __m512i both = _mm512_cvtepu8_epi32(load_part(packed + at / 2, (count - at + 1) / 2));
            index = _mm512_or_si512(both, _mm512_slli_epi32(both, 12));
          } else {
            index = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(from + at)));
          }
          _mm512_storeu_si512(out + at, _mm512_permutexvar_epi16(index, table));
        }
      } else {
        for (; at < end; at += 32) {
          F low = mul(sub(load_u8(from + at), offset), scale), high = mul(sub(load_u8(from + at + W), offset), scale);
          put_pairs(out + at, low, high);
        }
      }
    }
  }
  static inline __m128i load_part(const uint8_t* p, int64_t bytes) {  // at most 16
    return bytes >= 16 ? _mm_loadu_si128((const __m128i*)p) : _mm_maskz_loadu_epi8((__mmask16)((1u << bytes) - 1), p);
  }
};

// A few tokens of float8 with one scale a row: bfloat16 holds the values exactly, and the sum takes the scale.
bool used_at_once(const Job& j) { return j.m < 12 && is_float8(*j.format) && j.format->group_size >= j.format->k; }

bool in_pairs(const Job& j) {
  if (j.x_dtype != ZP_BF16 || j.int8_activations) return false;
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
  F acc[MR][2], words[2];
  unroll<MR>([&](auto r) INLINE { acc[r][0] = acc[r][1] = zero(); });
  for (int64_t i = 0; i < k; i += 64) {
    __builtin_prefetch(p + i + AHEAD);
    decode(p + i, k - i, words);
    bool both = k - i > 32;
    unroll<MR>([&](auto r) INLINE {
      acc[r][0] = Pairs::mac(words[0], load(x + r * stride + i / 2), acc[r][0]);
      if (both) acc[r][1] = Pairs::mac(words[1], load(x + r * stride + i / 2 + W), acc[r][1]);
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
  if (j.x_dtype != ZP_BF16 || j.int8_activations) return tile512(j);
  return j.m >= (is_float8(*j.format) ? 12 : 32);
}

int64_t tokens_pairs(const Job& j) { return !in_pairs(j) ? tokens512(j) : j.tiled ? TILE_M : 1; }

size_t prepared_bytes_pairs(const Job& j) {
  if (!in_pairs(j)) return prepared_bytes512(j);
  return j.tiled ? prepared_gemm_bytes<Pairs>(j) : j.m * pairs_stride(j) * 4;
}

void prepare_pairs(const Job& j, int64_t unit) {
  if (!in_pairs(j)) return prepare512(j, unit);
  if (j.tiled) return prepare_gemm<Pairs>(j, unit);
  Pairs::token(j, unit, 2 * pairs_stride(j), (float*)j.prepared + unit * pairs_stride(j));
}

size_t scratch_bytes_pairs(const Job& j, int64_t rows) {
  if (!in_pairs(j)) return scratch_bytes512(j, rows);
  return j.tiled ? scratch_bytes(j, rows) : PAIRS_N * pairs_stride(j) * 4;
}

void multiply_pairs(const Job& j, int64_t n0, int64_t n1, uint8_t* scratch) {
  if (!in_pairs(j)) return multiply512(j, n0, n1, scratch);
  j.tiled ? gemm<Pairs>(j, n0, n1, scratch) : dot_pairs_rows(j, n0, n1, (float*)scratch);
}

double peak_pairs(int32_t what, int64_t repeats) {
  if (what != ZP_PEAK_BFLOAT16) return peak512(what, repeats);
  constexpr int CHAINS = 12;
  F acc[CHAINS], a = set1(peak_sink);
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
                         read,
                         peak_pairs};

}  // namespace zp
