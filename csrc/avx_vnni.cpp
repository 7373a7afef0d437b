// AVX2 with AVX-VNNI (Alder Lake and later without AVX512, Sierra Forest): 32 products of a byte and a byte, or 16 of
// words, summed in one instruction; see avx2.inc.h.
#include <immintrin.h>

#include "kernels.h"
#include "unroll.h"

namespace zp {
namespace {

// In assembly, because g++ 12 spills an accumulator of the intrinsics in every iteration.
inline INLINE __m256i dot_words(__m256i acc, __m256i a, __m256i b) {
  __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
  return acc;
}
inline INLINE __m256i dot_codes(__m256i acc, __m256i codes, __m256i q) {
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(codes), "x"(q));
  return acc;
}

// The widths that divide a byte; unpacking others makes words.
constexpr bool as_bytes(int bits, int) { return bits == 2 || bits == 4 || bits == 8; }

template <int V, int Q>
inline __m256i dot_planes(const __m256i* codes, const uint8_t* q) {
  auto plane = [&](__m256i sums, const uint8_t* p) INLINE {
    unroll<V>([&](auto v)
                  INLINE { sums = dot_codes(sums, codes[v], _mm256_loadu_si256((const __m256i*)(p + 32 * v))); });
    return sums;
  };
  __m256i sums = plane(_mm256_setzero_si256(), q);
  if constexpr (Q == 2) sums = plane(_mm256_slli_epi32(sums, 8), q + 32 * V);
  return sums;
}

// Gemm: codes and planes of tokens as bytes, four columns in 32 bits.
using Code = uint8_t;
constexpr int INT_N = 6, INT_V = 2;
template <int P>
constexpr int PLANES = P;
template <int P>
inline void split_columns(const int16_t* q, uint32_t* out) {
  __m256i first = _mm256_loadu_si256((const __m256i*)q), second = _mm256_loadu_si256((const __m256i*)(q + 16));
  auto bytes = [](__m256i a, __m256i b) INLINE { return _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8); };
  if constexpr (P == 1) {
    _mm256_storeu_si256((__m256i*)out, bytes(first, second));
  } else {  // q = 256 * high + low; words of the two take turns
    auto high = [](__m256i v) INLINE { return _mm256_srai_epi16(_mm256_add_epi16(v, _mm256_set1_epi16(128)), 8); };
    auto low = [](__m256i v) INLINE { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8); };
    __m256i highs = bytes(high(first), high(second)), lows = bytes(low(first), low(second));
    __m256i front = _mm256_unpacklo_epi32(highs, lows), back = _mm256_unpackhi_epi32(highs, lows);
    _mm256_storeu_si256((__m256i*)out, _mm256_permute2x128_si256(front, back, 0x20));
    _mm256_storeu_si256((__m256i*)(out + 8), _mm256_permute2x128_si256(front, back, 0x31));
  }
}

#include "avx2.inc.h"
}  // namespace

extern const Isa avx_vnni;
const Isa avx_vnni = {"avx_vnni",
                      tile2,
                      tokens_vector,
                      prepared_bytes_vector,
                      prepare_vector,
                      rows_vector,
                      scratch_bytes_vector,
                      multiply_vector,
                      decode,
                      encode,
                      normalize,
                      gate,
                      rotate,
                      attend,
                      nullptr,
                      read,
                      peak};

}  // namespace zp
