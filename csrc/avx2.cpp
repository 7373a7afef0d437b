// AVX2 with FMA and F16C (Haswell and later, all Zen): activations as int16, 16 products in one instruction.
#include <immintrin.h>

#include "kernels.h"

namespace zp {
namespace {

constexpr int W = 8;
constexpr int TILE_N = 4;  // 4 x 3 sums, 3 vectors of tokens, 1 weight: all 16 registers
constexpr int TILE_V = 3;
using F = __m256;

inline F zero() { return _mm256_setzero_ps(); }
inline F set1(float v) { return _mm256_set1_ps(v); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F abs_max(F a, F b) {  // a NaN in b stays, and one in a: max returns its second operand
  F magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), b);
  F top = _mm256_max_ps(magnitude, a);
  return _mm256_blendv_ps(top, magnitude, _mm256_cmp_ps(b, b, _CMP_UNORD_Q));
}
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F one_where_above(F a, F b) { return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ), _mm256_set1_ps(1)); }
inline void store_u8(uint8_t* p, F v) {
  __m256i wide = _mm256_cvtps_epi32(v);
  __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(half, half));
}
inline F round_even(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline float sum(F a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float highest(F a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
inline float smallest(F a) { return -highest(_mm256_sub_ps(_mm256_setzero_ps(), a)); }
inline float largest(F a) {
  if (_mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q))) return __builtin_nanf("");
  return highest(a);
}
inline F load_u8(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline F load_i8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline F load_f16_part(const uint16_t* p, int64_t count) {
  uint16_t whole[8] = {};
  for (int64_t i = 0; i < count; i++) whole[i] = p[i];
  return load_f16(whole);
}
inline F load_i8_part(const int8_t* p, int64_t count) {
  int8_t whole[8] = {};
  for (int64_t i = 0; i < count; i++) whole[i] = p[i];
  return load_i8(whole);
}
inline F load_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline F load_e5m2(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p)), 8));
}
inline F load_e4m3(const uint8_t* p) {
  __m128i codes = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p));
  __m128i largest = _mm_set1_epi16(0x7f), nan = _mm_cmpeq_epi16(_mm_and_si128(codes, largest), largest);
  __m128i half = _mm_and_si128(_mm_slli_epi16(codes, 7), _mm_set1_epi16((short)0xbf80));
  F v = _mm256_mul_ps(_mm256_cvtph_ps(half), set1(256.0f));
  return _mm256_blendv_ps(v, set1(__builtin_nanf("")), _mm256_castsi256_ps(_mm256_cvtepi16_epi32(nan)));
}
inline void store_f16(uint16_t* p, F v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_bf16(uint16_t* p, F v) {
  __m256i bits = _mm256_castps_si256(v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
inline void store_i16(int16_t* p, F v) {
  __m256i wide = _mm256_cvtps_epi32(v);
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(wide, wide), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
inline F lookup16(const float* levels, const uint8_t* codes) {
  __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)codes));
  __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels), index);
  __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels + 8), index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

#include "spread.inc.h"

inline void unpack(const uint8_t* p, int bits, int64_t count, uint8_t* out) {
  if (bits == 4) {
    for (; count >= 32; count -= 32, p += 16, out += 32) {
      __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
      b = _mm256_and_si256(_mm256_or_si256(b, _mm256_slli_epi16(b, 4)), _mm256_set1_epi8(15));
      _mm256_storeu_si256((__m256i*)out, b);
    }
  } else if (bits == 8) {
    __builtin_memcpy(out, p, count);
    return;
  }
  if (count > 0) by_bits<UnpackOctets>(bits, p, count, out);
}

struct Integer {
  // 4 bits: even and odd columns; others in order.
  template <int BITS>
  static constexpr int CHUNK = 32;
  template <int BITS, int P>
  static constexpr int BYTES = 64;

  struct Codes {
    __m256i v[2];
  };
  template <int BITS>
  static inline Codes codes(const uint8_t* p) {
    if constexpr (BITS == 8) {
      return {{_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)),
               _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(p + 16)))}};
    } else if constexpr (BITS == 4) {
      __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
      return {{_mm256_and_si256(b, _mm256_set1_epi16(15)), _mm256_srli_epi16(b, 4)}};
    } else {
      alignas(32) uint8_t bytes[32];
      unpack_octets<BITS>(p, 32, bytes);
      return {{_mm256_cvtepu8_epi16(_mm_load_si128((const __m128i*)bytes)),
               _mm256_cvtepu8_epi16(_mm_load_si128((const __m128i*)(bytes + 16)))}};
    }
  }
  template <int BITS>
  static inline Codes codes_part(const uint8_t* p, int64_t bytes) {
    uint8_t whole[32] = {};
    __builtin_memcpy(whole, p, bytes);
    return codes<BITS>(whole);
  }
  template <int BITS, int P>
  static inline void arrange(const int16_t* q, uint8_t* out) {
    int16_t* to = (int16_t*)out;
    for (int i = 0; i < 32; i++) to[BITS == 4 ? i / 2 + i % 2 * 16 : i] = q[i];
  }
  template <int BITS, int P>
  static inline F mac(const Codes& c, const uint8_t* q) {
    __m256i even = _mm256_madd_epi16(c.v[0], _mm256_loadu_si256((const __m256i*)q));
    __m256i odd = _mm256_madd_epi16(c.v[1], _mm256_loadu_si256((const __m256i*)(q + 32)));
    return _mm256_cvtepi32_ps(_mm256_add_epi32(even, odd));
  }
  template <int BITS>
  struct Lanes {
    int shift;
    explicit Lanes(int64_t block) : shift(block >= (1 << 20) ? 62 : __builtin_ctzll(block)) {}
    inline F scales(const float* factor, int64_t chunk) const { return set1(factor[(chunk * 32) >> shift]); }
  };
};

#include "body.inc.h"

double peak(int32_t what, int64_t repeats) { return what == ZP_PEAK_FLOAT32 ? peak_float(repeats) : 0; }

}  // namespace

extern const Isa avx2;
const Isa avx2 = {"avx2",        tile,     tokens, prepared_bytes, prepare, rows,
                  scratch_bytes, multiply, decode, encode,         read,    peak};

}  // namespace zp
