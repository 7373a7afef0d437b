// AVX512 with VNNI (Cascade Lake and later, Zen 4 and later): 64 products of a byte and a byte in one instruction.
// Included inside an anonymous namespace by avx512.cpp, and by amx.cpp, which adds tiles.

constexpr int W = 16;
constexpr int TILE_N = 6;  // 6 x 4 sums, 4 vectors of tokens, 1 weight: 29 of 32 registers
constexpr int TILE_V = 4;
using F = __m512;

inline F zero() { return _mm512_setzero_ps(); }
inline F set1(float v) { return _mm512_set1_ps(v); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F abs_max(F a, F b) {  // a NaN in b stays, and one in a: max returns its second operand
  F magnitude = _mm512_abs_ps(b);
  return _mm512_mask_mov_ps(_mm512_max_ps(magnitude, a), _mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q), magnitude);
}
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline float smallest(F a) { return _mm512_reduce_min_ps(a); }
inline float highest(F a) { return _mm512_reduce_max_ps(a); }
inline void store_u8(uint8_t* p, F v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v))); }
inline void store_nearest16(uint8_t* p, F v, const float* midpoint, const uint8_t* code) {
  __m512i below = _mm512_setzero_si512();
  unroll<4>([&](auto step) INLINE {  // the midpoints that `below` may still grow to: every 8th, 4th, 2nd, each
    constexpr int half = 8 >> step;
    F middle = _mm512_permutexvar_ps(below, _mm512_maskz_loadu_ps(0xffff >> (half - 1), midpoint + half - 1));
    below = _mm512_mask_add_epi32(below, _mm512_cmp_ps_mask(v, middle, _CMP_GT_OQ), below, _mm512_set1_epi32(half));
  });
  __m128i codes = _mm_loadu_si128((const __m128i*)code);
  _mm_storeu_si128((__m128i*)p, _mm_shuffle_epi8(codes, _mm512_cvtepi32_epi8(below)));
}
inline F round_even(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline __m128 quarter(F a) {  // sums of the lanes that are equal modulo 4
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
inline float sum(F a) {
  __m128 v = quarter(a);
  v = _mm_add_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}
inline INLINE void sum4(F a, F b, F c, F d, float* out) {
  __m128 x = quarter(a), y = quarter(b), z = quarter(c), w = quarter(d);
  __m128 xy = _mm_add_ps(_mm_unpacklo_ps(x, y), _mm_unpackhi_ps(x, y));
  __m128 zw = _mm_add_ps(_mm_unpacklo_ps(z, w), _mm_unpackhi_ps(z, w));
  _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(xy, zw), _mm_movehl_ps(zw, xy)));
}
inline void transpose(F* v) {  // 16 x 16: pairs of lanes, fours, then the four 128-bit parts
  F pairs[16], fours[16];
  unroll<8>([&](auto i) INLINE {
    pairs[2 * i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    pairs[2 * i + 1] = _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  });
  unroll<8>([&](auto i) INLINE {  // fours[4 * a + c]: column c of each part, of rows 4 * a on
    constexpr int at = i / 2 * 4 + i % 2;
    fours[i / 2 * 4 + i % 2 * 2] = _mm512_shuffle_ps(pairs[at], pairs[at + 2], 0x44);
    fours[i / 2 * 4 + i % 2 * 2 + 1] = _mm512_shuffle_ps(pairs[at], pairs[at + 2], 0xee);
  });
  unroll<4>([&](auto c) INLINE {
    F a = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0x88), b = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0xdd);
    F d = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0x88);
    F e = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0xdd);
    v[c] = _mm512_shuffle_f32x4(a, d, 0x88), v[8 + c] = _mm512_shuffle_f32x4(a, d, 0xdd);
    v[4 + c] = _mm512_shuffle_f32x4(b, e, 0x88), v[12 + c] = _mm512_shuffle_f32x4(b, e, 0xdd);
  });
}
inline float largest(F a) {
  return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) ? __builtin_nanf("") : _mm512_reduce_max_ps(a);
}
inline F load_u8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline F load_i8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline __mmask16 lanes(int64_t count) { return (__mmask16)((1u << count) - 1); }
inline F load_part(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(lanes(count), p); }
inline F load_f16_part(const uint16_t* p, int64_t count, bool) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(count), p));
}
inline F load_i8_part(const int8_t* p, int64_t count, bool) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes(count), p)));
}
inline F lookup256_part(const float* levels, const uint8_t* p, int64_t count) {
  __m128i codes = _mm_maskz_loadu_epi8(lanes(count < W ? count : W), p);
  return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(codes), levels, 4);
}
inline F from_bf16(__m256i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16)); }
inline F load_bf16(const uint16_t* p) { return from_bf16(_mm256_loadu_si256((const __m256i*)p)); }
inline F load_e5m2(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)), 8));
}
inline F load_e4m3(const uint8_t* p) {
  const __m128i largest = _mm_set1_epi8(0x7f);
  __m256i c = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
  F v = _mm512_mul_ps(_mm512_cvtph_ps(_mm256_and_si256(c, _mm256_set1_epi16((short)0xbf80))), set1(256.0f));
  __mmask16 nan = _mm_cmpeq_epi8_mask(_mm_and_si128(_mm_loadu_si128((const __m128i*)p), largest), largest);
  return _mm512_mask_mov_ps(v, nan, set1(__builtin_nanf("")));
}
inline F from_e8m0(__m128i bytes) {  // 2^-127 is a subnormal, 255 NaN
  __m512i e = _mm512_cvtepu8_epi32(bytes);
  __mmask16 ends =
      _mm512_cmpeq_epi32_mask(e, _mm512_setzero_si512()) | _mm512_cmpeq_epi32_mask(e, _mm512_set1_epi32(255));
  __m512i bits = _mm512_slli_epi32(e, 23);
  return _mm512_castsi512_ps(_mm512_mask_or_epi32(bits, ends, bits, _mm512_set1_epi32(1 << 22)));
}
inline F load_e8m0(const uint8_t* p) { return from_e8m0(_mm_loadu_si128((const __m128i*)p)); }
inline F load_e8m0_part(const uint8_t* p, int64_t count, bool) {
  return from_e8m0(_mm_maskz_loadu_epi8(lanes(count), p));
}
inline void store_f16(uint16_t* p, F v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_bf16(uint16_t* p, F v) {
  __m512i bits = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(rounded));
}
inline void store_i16(int16_t* p, F v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v)));
}
inline F lookup16(const float* levels, const uint8_t* codes) {
  __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes));
  return _mm512_permutexvar_ps(index, _mm512_loadu_ps(levels));
}

// acc += 64 products of unsigned codes and signed q. In assembly, because g++ 12 copies and spills the accumulators of
// the intrinsic in every iteration, at three times the cost.
inline __attribute__((always_inline)) __m512i dot_bytes(__m512i acc, __m512i codes, __m512i q) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(q));
  return acc;
}

// The same of 16-bit words, two products in each lane of 32 bits.
inline INLINE __m512i dot_words(__m512i acc, __m512i words, __m512i q) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(words), "v"(q));
  return acc;
}

inline __mmask64 first(int64_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

// 64 codes in order from 8 * BITS bytes, for the widths that do not divide a byte.
#ifdef __AVX512VBMI__
// The bytes of an octet of codes are moved into a word of 64 bits, and its codes picked there.
struct Spread {
  alignas(64) uint8_t bytes[64];  // for vpermb
  alignas(64) uint8_t bits[64];   // for vpmultishiftqb: where each code begins
};

template <int BITS>
constexpr Spread make_spread() {
  Spread s = {};
  for (int i = 0; i < 64; i++) s.bytes[i] = (uint8_t)(i / 8 * BITS + i % 8), s.bits[i] = (uint8_t)(BITS * (i % 8));
  return s;
}

template <int BITS>
inline __m512i spread(__m512i packed) {
  static constexpr Spread s = make_spread<BITS>();
  __m512i octets = _mm512_permutexvar_epi8(_mm512_load_si512(s.bytes), packed);
  __m512i codes = _mm512_multishift_epi64_epi8(_mm512_load_si512(s.bits), octets);
  return _mm512_and_si512(codes, _mm512_set1_epi8((1 << BITS) - 1));
}
#else
// Every code is moved, with the byte that may hold its upper bits, into 16 bits of its own and shifted down there.
struct Spread {
  alignas(64) uint16_t words[2][32];  // for vpermw: the words that hold octet o of codes, into one 128-bit lane
  alignas(64) uint8_t bytes[2][64];   // for vpshufb: the two bytes of each code
  alignas(64) uint16_t shifts[32];
};

template <int BITS>
constexpr Spread make_spread() {
  Spread s = {};
  for (int half = 0; half < 2; half++) {
    for (int lane = 0; lane < 4; lane++) {
      int byte = BITS * (2 * lane + half);  // where the octet starts
      for (int i = 0; i < 8; i++) {
        int word = byte / 2 + i;
        s.words[half][lane * 8 + i] = (uint16_t)(word < 32 ? word : 31);
        int at = byte % 2 + BITS * i / 8;
        s.bytes[half][lane * 16 + 2 * i] = (uint8_t)at;
        s.bytes[half][lane * 16 + 2 * i + 1] = (uint8_t)(at + 1);
        s.shifts[lane * 8 + i] = (uint16_t)(BITS * i % 8);
      }
    }
  }
  return s;
}

template <int BITS>
inline __m512i spread(__m512i packed) {
  static constexpr Spread s = make_spread<BITS>();
  __m512i mask = _mm512_set1_epi16((1 << BITS) - 1), shifts = _mm512_load_si512(s.shifts);
  __m512i half[2];
  for (int h = 0; h < 2; h++) {
    __m512i words = _mm512_permutexvar_epi16(_mm512_load_si512(s.words[h]), packed);
    __m512i pairs = _mm512_shuffle_epi8(words, _mm512_load_si512(s.bytes[h]));
    half[h] = _mm512_and_si512(_mm512_srlv_epi16(pairs, shifts), mask);
  }
  return _mm512_packus_epi16(half[0], half[1]);
}
#endif

inline bool fetches_soon() { return false; }

#include "spread.inc.h"

// The factors of the 16 sums of a chunk: sum t covers CHUNK / 16 columns from there on, or BY_FOUR 16 columns from
// 16 * (t % 4) on.
template <int CHUNK, bool BY_FOUR = false>
struct LanesOf : Positions<CHUNK> {
  __m512i index;
  explicit LanesOf(int64_t block) : Positions<CHUNK>(block) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i column = BY_FOUR ? _mm512_slli_epi32(_mm512_and_si512(lane, _mm512_set1_epi32(3)), 4)
                             : _mm512_mullo_epi32(lane, _mm512_set1_epi32(CHUNK / 16));
    index = _mm512_srl_epi32(column, _mm_cvtsi32_si128(this->bits));
  }
  template <int BLOCKS>
  inline F take(const float* factors) const {
    if constexpr (BLOCKS == 1) return set1(*factors);
    if constexpr (BLOCKS == 2) {
      __m512i both = _mm512_broadcastq_epi64(_mm_loadl_epi64((const __m128i*)factors));
      return _mm512_permutevar_ps(_mm512_castsi512_ps(both), index);
    }
    return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(factors)), index);
  }
};

// Codes as bytes, q as Q planes of them. Codes of a chunk: 4 bits as even and odd columns, 2 bits as the columns 0, 1,
// 2, 3 modulo 4, others in order.
template <int WIDTH, int Q>
struct Integer {
  static constexpr int BITS = WIDTH, CHUNK = BITS == 4 ? 128 : 64, BYTES = CHUNK * Q;
  static constexpr float HALF = 1 << (BITS - 1), unit = 1;
  using Lanes = LanesOf<CHUNK, BITS == 2>;

  explicit Integer(const IntegerLevels&) {}

  struct Codes {
    __m512i v[2];
  };

  static inline Codes split(__m512i x) {
    if constexpr (BITS == 8) {
      return {{x, x}};
    } else if constexpr (BITS == 4) {
      __m512i low = _mm512_set1_epi8(15);
      return {{_mm512_and_si512(x, low), _mm512_and_si512(_mm512_srli_epi16(x, 4), low)}};
    } else if constexpr (BITS == 2) {
      const __m512i shifts = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
      __m512i four = _mm512_broadcast_i32x4(_mm512_castsi512_si128(x));
      __m512i codes = _mm512_and_si512(_mm512_srlv_epi32(four, shifts), _mm512_set1_epi8(3));
      return {{codes, codes}};
    } else {
      __m512i codes = spread<BITS>(x);
      return {{codes, codes}};
    }
  }

  inline Codes codes(const uint8_t* p) const {
    if constexpr (BITS == 8 || BITS == 4) return split(_mm512_loadu_si512(p));
    return split(_mm512_maskz_loadu_epi8(first(8 * BITS), p));
  }
  inline Codes codes_part(const uint8_t* p, int64_t bytes) const {
    return split(_mm512_maskz_loadu_epi8(first(bytes), p));
  }

  // q of a chunk -> planes of int8: high then low of q = 256 * high + low, or q itself; each in the order of the codes.
  static inline void arrange(const int16_t* q, uint8_t* out) {
    const __m512i round = _mm512_set1_epi32(128);
    if constexpr (BITS == 4) {
      for (int i = 0; i < 4; i++) {
        __m512i pair = _mm512_loadu_si512(q + 32 * i);
        __m512i even = _mm512_srai_epi32(_mm512_slli_epi32(pair, 16), 16), odd = _mm512_srai_epi32(pair, 16);
        if constexpr (Q == 2) {
          put16(out + 16 * i, _mm512_srai_epi32(_mm512_add_epi32(even, round), 8));
          put16(out + 64 + 16 * i, _mm512_srai_epi32(_mm512_add_epi32(odd, round), 8));
        }
        put16(out + 128 * (Q - 1) + 16 * i, even);
        put16(out + 128 * (Q - 1) + 64 + 16 * i, odd);
      }
    } else {
      for (int i = 0; i < 4; i++) {
        __m512i v;
        if constexpr (BITS == 2) {  // lane i: columns i, i + 4, ...
          const __m512i column = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
          const __m512i words = _mm512_add_epi32(column, _mm512_set1_epi32(i));
          __m512i found = _mm512_permutex2var_epi16(_mm512_loadu_si512(q), words, _mm512_loadu_si512(q + 32));
          v = _mm512_srai_epi32(_mm512_slli_epi32(found, 16), 16);
        } else {
          v = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)(q + 16 * i)));
        }
        if constexpr (Q == 2) put16(out + 16 * i, _mm512_srai_epi32(_mm512_add_epi32(v, round), 8));
        put16(out + 64 * (Q - 1) + 16 * i, v);
      }
    }
  }
  static inline void put16(uint8_t* out, __m512i v) { _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8(v)); }

  // 16 partial sums of codes * q.
  static inline F mac(const Codes& c, const uint8_t* q) {
    constexpr int V = BITS == 4 ? 2 : 1;
    __m512i high = _mm512_setzero_si512();
    for (int v = 0; v < V; v++) high = dot_bytes(high, c.v[v], _mm512_loadu_si512(q + 64 * v));
    if constexpr (Q == 2) {
      __m512i low = _mm512_slli_epi32(high, 8);
      for (int v = 0; v < V; v++) low = dot_bytes(low, c.v[v], _mm512_loadu_si512(q + 64 * (V + v)));
      return _mm512_cvtepi32_ps(low);
    }
    return _mm512_cvtepi32_ps(high);
  }
};

// Levels as 16 bits, looked up by words whose lowest nibble is a code, in a table that holds them twice.
struct Codebook {
  static constexpr int BITS = 4, CHUNK = 128, BYTES = 256;
  static constexpr float HALF = 0;
  using Lanes = LanesOf<CHUNK>;
  __m512i levels;
  float unit;

  explicit Codebook(const IntegerLevels& integers)
      : levels(_mm512_broadcast_i64x4(_mm256_load_si256((const __m256i*)integers.value))), unit(integers.unit) {}

  struct Codes {
    __m512i v[4];
  };
  inline Codes split(__m512i x) const {
    Codes c;
    unroll<4>([&](auto v) INLINE { c.v[v] = _mm512_permutexvar_epi16(_mm512_srli_epi16(x, 4 * v), levels); });
    return c;
  }
  inline Codes codes(const uint8_t* p) const { return split(_mm512_loadu_si512(p)); }
  inline Codes codes_part(const uint8_t* p, int64_t bytes) const {
    return split(_mm512_maskz_loadu_epi8(first(bytes), p));
  }
  static inline void arrange(const int16_t* q, uint8_t* out) {
    int16_t* to = (int16_t*)out;
    for (int v = 0; v < 4; v++) {
      for (int i = 0; i < 32; i++) to[32 * v + i] = q[4 * i + v];
    }
  }
  static inline F mac(const Codes& c, const uint8_t* q) {
    __m512i sums = _mm512_setzero_si512();
    unroll<4>([&](auto v) INLINE { sums = dot_words(sums, c.v[v], _mm512_loadu_si512(q + 64 * v)); });
    return _mm512_cvtepi32_ps(sums);
  }
};

inline void unpack(const uint8_t* p, int bits, int64_t count, uint8_t* out) {
  const __m512i low = _mm512_set1_epi8(15);
  int64_t bytes = (count * bits + 7) / 8;
  for (int64_t i = 0; i < count; i += 64, p += 8 * bits, bytes -= 8 * bits) {
    __m512i x = _mm512_maskz_loadu_epi8(first(bytes < 8 * bits ? bytes : 8 * bits), p), codes;
    switch (bits) {
      case 2: codes = spread<2>(x); break;
      case 3: codes = spread<3>(x); break;
      case 4: {
        __m512i b = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(x));
        codes = _mm512_and_si512(_mm512_or_si512(b, _mm512_slli_epi16(b, 4)), low);
        break;
      }
      case 5: codes = spread<5>(x); break;
      case 6: codes = spread<6>(x); break;
      case 7: codes = spread<7>(x); break;
      default: codes = x;
    }
    _mm512_storeu_si512(out + i, codes);
  }
}

#include "body.inc.h"

using Words = __m512i;
inline Words load_words(const uint8_t* p, int64_t bytes) { return _mm512_maskz_loadu_epi8(first(bytes), p); }

template <int MANTISSA>
inline INLINE void halves(Words words, F* out) {
  __m512i byte[2] = {_mm512_slli_epi16(words, 8), words};
  unroll<2>([&](auto b) INLINE {
    if constexpr (MANTISSA == 3) byte[b] = _mm512_srai_epi16(byte[b], 1);
    byte[b] = _mm512_and_si512(byte[b], _mm512_set1_epi16((short)(MANTISSA == 3 ? 0xbf80 : 0xff00)));
    out[b] = _mm512_cvtph_ps(_mm512_castsi512_si256(byte[b]));
    out[2 + b] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(byte[b], 1));
  });
}

struct Largest {  // twice each byte, so without its sign
  __m512i most = _mm512_setzero_si512();
  inline void see(Words words) { most = _mm512_max_epu8(most, _mm512_add_epi8(words, words)); }
  inline bool reaches(int magnitude) const {
    return _mm512_cmpge_epu8_mask(most, _mm512_set1_epi8((char)(2 * magnitude))) != 0;
  }
};

#include "float8.inc.h"

// --- integer gemm: tokens as bytes, four columns in 32 bits ---

using Ints = __m512i;
using Code = uint8_t;
constexpr int INT_N = 6, INT_V = 4;
template <int P>
constexpr int PLANES = P;
inline Ints set1_ints(int32_t v) { return _mm512_set1_epi32(v); }
inline Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
inline Ints dot_codes(Ints acc, Ints codes, Ints q) { return dot_bytes(acc, codes, q); }
inline Ints high_and_low(Ints high, Ints low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }
inline F to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }

// 32 q -> words of 4 columns: of the high plane, then of the low one (or q itself) the next.
template <int P>
inline void split_columns(const int16_t* q, uint32_t* out) {
  __m512i v = _mm512_loadu_si512(q);
  alignas(32) uint32_t high[8], low[8];
  _mm256_store_si256((__m256i*)low, _mm512_cvtepi16_epi8(v));
  if constexpr (P == 2) {
    v = _mm512_srai_epi16(_mm512_add_epi16(v, _mm512_set1_epi16(128)), 8);
    _mm256_store_si256((__m256i*)high, _mm512_cvtepi16_epi8(v));
  }
  for (int i = 0; i < 8; i++) {
    if constexpr (P == 2) out[i * P] = high[i];
    out[i * P + P - 1] = low[i];
  }
}

#include "integer_gemm.inc.h"

// --- the table ---

// Below these, decoding every row again for four tokens at a time is cheaper than half-empty vectors of tokens.
bool tile512(const Job& j) { return j.m >= (is_integer(j) ? 16 : 32); }

double peak512(int32_t what, int64_t repeats) {
  if (what == ZP_PEAK_FLOAT32) return peak_float(repeats);
  if (what != ZP_PEAK_BYTES) return 0;
  constexpr int CHAINS = 12;
  __m512i acc[CHAINS] = {}, a = _mm512_set1_epi8(1), b = _mm512_set1_epi32(0x01020304 + (int)peak_sink);
  for (int64_t i = 0; i < repeats; i++) {
    unroll<CHAINS>([&](auto c) INLINE { acc[c] = dot_bytes(acc[c], a, b); });
  }
  unroll<CHAINS - 1>([&](auto c) INLINE { acc[0] = _mm512_add_epi32(acc[0], acc[c + 1]); });
  peak_sink = (float)_mm512_reduce_add_epi32(acc[0]) * 0.0f;
  return 2.0 * 64 * CHAINS * (double)repeats;
}
