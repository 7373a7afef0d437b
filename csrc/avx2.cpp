// AVX2 with FMA and F16C (Haswell and later, all Zen): 16 products of words in one instruction; see avx2.inc.h.
#include <immintrin.h>

#include "kernels.h"
#include "unroll.h"

namespace zp {
namespace {

inline __m256i dot_words(__m256i acc, __m256i a, __m256i b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }

// Where the sum of two products of bytes, and of those of a chunk, cannot overflow 16 bits: vpmaddubsw adds them there.
constexpr bool as_bytes(int bits, int q_bytes) { return bits == 2 || (bits == 4 && q_bytes == 1); }

template <int V, int Q>
inline __m256i dot_planes(const __m256i* codes, const uint8_t* q) {
  auto plane = [&](const uint8_t* p) INLINE {  // at most 4 * 2 * 3 * 128 or 2 * 2 * 15 * 128 in 16 bits
    __m256i sums = _mm256_maddubs_epi16(codes[0], _mm256_loadu_si256((const __m256i*)p));
    unroll<V - 1>([&](auto v) INLINE {
      __m256i at = _mm256_loadu_si256((const __m256i*)(p + 32 * (v + 1)));
      sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes[v + 1], at));
    });
    return sums;
  };
  __m256i sums = _mm256_madd_epi16(plane(q + 32 * V * (Q - 1)), _mm256_set1_epi16(1));
  if constexpr (Q == 2) sums = _mm256_add_epi32(sums, _mm256_madd_epi16(plane(q), _mm256_set1_epi16(256)));
  return sums;
}

// Gemm: codes and tokens as words, two columns in 32 bits.
using Code = uint16_t;
constexpr int INT_N = 4, INT_V = 2;
template <int P>
constexpr int PLANES = 1;
// In assembly, because g++ 12 spills an accumulator of the intrinsics in every iteration.
inline INLINE __m256i dot_codes(__m256i acc, __m256i codes, __m256i q) {
  __m256i products;
  __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(products) : "x"(codes), "x"(q));
  return acc;
}
template <int P>
inline void split_columns(const int16_t* q, uint32_t* out) {
  __builtin_memcpy(out, q, 64);
}

#include "avx2.inc.h"
}  // namespace

extern const Isa avx2;
const Isa avx2 = {"avx2",
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
