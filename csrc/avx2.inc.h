// AVX2 with FMA and F16C. Included inside an anonymous namespace by avx2.cpp and by avx_vnni.cpp, which define before
// it how integers are multiplied:
//
//   dot_words          acc + the products of 16-bit words, two in each lane
//   as_bytes           whether codes of so many bits are bytes beside q of so many bytes, else both are words
//   dot_planes<V, Q>   8 sums of V vectors of codes times Q planes of q, all as bytes
//   Code, INT_N, INT_V, PLANES, split_columns, dot_codes   see integer_gemm.inc.h

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
inline void store_u8(uint8_t* p, F v) {
  __m256i wide = _mm256_cvtps_epi32(v);
  __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(half, half));
}
inline void store_nearest16(uint8_t* p, F v, const float* midpoint, const uint8_t* code) {
  auto twice_and = [](__m256i below, F bit) INLINE {  // bit: -1 where set
    return _mm256_sub_epi32(_mm256_add_epi32(below, below), _mm256_castps_si256(bit));
  };
  auto above = [&](F middle) INLINE { return _mm256_cmp_ps(v, middle, _CMP_GT_OQ); };
  const float* m = midpoint;
  F first = above(set1(m[7]));
  F second = above(_mm256_blendv_ps(set1(m[3]), set1(m[11]), first));
  __m256i below = twice_and(twice_and(_mm256_setzero_si256(), first), second);
  F middle = _mm256_permutevar8x32_ps(_mm256_setr_ps(m[1], m[5], m[9], m[13], 0, 0, 0, 0), below);
  below = twice_and(below, above(middle));
  F even = _mm256_setr_ps(m[0], m[2], m[4], m[6], m[8], m[10], m[12], m[14]);
  below = twice_and(below, above(_mm256_permutevar8x32_ps(even, below)));
  __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(below), _mm256_extracti128_si256(below, 1));
  __m128i codes = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)code), _mm_packus_epi16(half, half));
  _mm_storel_epi64((__m128i*)p, codes);
}
inline F round_even(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline float sum(F a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline INLINE void sum4(F a, F b, F c, F d, float* out) {
  auto half = [](F v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); };
  __m128 x = half(a), y = half(b), z = half(c), w = half(d);
  __m128 xy = _mm_add_ps(_mm_unpacklo_ps(x, y), _mm_unpackhi_ps(x, y));
  __m128 zw = _mm_add_ps(_mm_unpacklo_ps(z, w), _mm_unpackhi_ps(z, w));
  _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(xy, zw), _mm_movehl_ps(zw, xy)));
}
inline void transpose(F* v) {  // 8 x 8
  F pairs[8], fours[8];
  unroll<4>([&](auto i) INLINE {
    pairs[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    pairs[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  });
  unroll<4>([&](auto i) INLINE {
    constexpr int at = i / 2 * 4 + i % 2;
    fours[i / 2 * 4 + i % 2 * 2] = _mm256_shuffle_ps(pairs[at], pairs[at + 2], 0x44);
    fours[i / 2 * 4 + i % 2 * 2 + 1] = _mm256_shuffle_ps(pairs[at], pairs[at + 2], 0xee);
  });
  unroll<4>([&](auto i) INLINE {
    v[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  });
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
inline uint64_t first_bytes(const void* from, int64_t bytes) {  // 1 to 7 of them, then 0
  const uint8_t* p = (const uint8_t*)from;
  uint32_t low = 0, high = 0;
  if (bytes == 1) return *p;
  int64_t word = bytes < 4 ? 2 : 4;  // two words of this size overlap
  __builtin_memcpy(&low, p, 2), __builtin_memcpy(&high, p + bytes - 2, 2);
  if (word == 4) __builtin_memcpy(&low, p, 4), __builtin_memcpy(&high, p + bytes - 4, 4);
  return low | (uint64_t)high << 8 * (bytes - word);
}
// The last lanes of a vector moved to the front, zeros behind them.
inline __m128i last_bytes(__m128i v, int64_t bytes) {
  alignas(16) static constexpr int8_t from[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                  -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  return _mm_shuffle_epi8(v, _mm_loadu_si128((const __m128i*)(from + 16 - bytes)));
}
inline F load_part(const float* p, int64_t count) {
  alignas(32) static constexpr int32_t there[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_maskload_ps(p, _mm256_loadu_si256((const __m256i*)(there + W - count)));
}
inline F load_f16_part(const uint16_t* p, int64_t count, bool before) {
  if (before) return _mm256_cvtph_ps(last_bytes(_mm_loadu_si128((const __m128i*)(p + count - W)), 2 * count));
  uint64_t low, high = count > 4 ? first_bytes(p + 4, 2 * (count - 4)) : 0;
  if (count < 4) {
    low = first_bytes(p, 2 * count);
  } else {
    __builtin_memcpy(&low, p, 8);
  }
  return _mm256_cvtph_ps(_mm_set_epi64x((int64_t)high, (int64_t)low));
}
inline __m128i bytes_part(const void* p, int64_t count, bool before) {
  if (!before) return _mm_cvtsi64_si128((int64_t)first_bytes(p, count));
  return last_bytes(_mm_slli_si128(_mm_loadl_epi64((const __m128i*)((const uint8_t*)p + count - W)), W), count);
}
inline F load_i8_part(const int8_t* p, int64_t count, bool before) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes_part(p, count, before)));
}
inline F lookup256_part(const float* levels, const uint8_t* p, int64_t count) {
  __m128i codes = count < W ? bytes_part(p, count, false) : _mm_loadl_epi64((const __m128i*)p);
  return _mm256_i32gather_ps(levels, _mm256_cvtepu8_epi32(codes), 4);
}
inline F load_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline F load_e5m2(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p)), 8));
}
inline F load_e4m3(const uint8_t* p) {
  const __m128i largest = _mm_set1_epi8(0x7f);
  __m128i c = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p)), 7);
  F v = _mm256_mul_ps(_mm256_cvtph_ps(_mm_and_si128(c, _mm_set1_epi16((short)0xbf80))), set1(256.0f));
  __m128i nan = _mm_cmpeq_epi8(_mm_and_si128(_mm_loadl_epi64((const __m128i*)p), largest), largest);
  return _mm256_blendv_ps(v, set1(__builtin_nanf("")), _mm256_castsi256_ps(_mm256_cvtepi8_epi32(nan)));
}
inline F from_e8m0(__m128i bytes) {  // 2^-127 is a subnormal, 255 NaN
  __m256i e = _mm256_cvtepu8_epi32(bytes);
  __m256i ends =
      _mm256_or_si256(_mm256_cmpeq_epi32(e, _mm256_setzero_si256()), _mm256_cmpeq_epi32(e, _mm256_set1_epi32(255)));
  __m256i bit = _mm256_and_si256(ends, _mm256_set1_epi32(1 << 22));
  return _mm256_castsi256_ps(_mm256_or_si256(_mm256_slli_epi32(e, 23), bit));
}
inline F load_e8m0(const uint8_t* p) { return from_e8m0(_mm_loadl_epi64((const __m128i*)p)); }
inline F load_e8m0_part(const uint8_t* p, int64_t count, bool before) {
  return from_e8m0(bytes_part(p, count, before));
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

inline bool fetches_soon() { return __builtin_cpu_is("amd"); }  // Zen 3 gains 12 to 20 % by it, Golden Cove loses 13 %

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

// 64 codes from 8 * BITS bytes, for the widths that do not divide a byte: every code is moved, with the byte that may
// hold its upper bits, into 16 bits of its own, multiplied to their top and shifted down. Vector v holds octets v and
// 4 + v of the codes; each octet is in 16 bytes that begin at `begin`, none of them past the end.
struct Spread {
  int begin[8];
  alignas(32) uint8_t bytes[4][32];  // for vpshufb: the two bytes of each code
  alignas(32) uint16_t factors[16];
};

template <int BITS>
constexpr Spread make_spread() {
  Spread s = {};
  for (int octet = 0; octet < 8; octet++) {
    s.begin[octet] = octet * BITS < 8 * BITS - 16 ? octet * BITS : 8 * BITS - 16;
    for (int i = 0; i < 8; i++) {
      int at = octet * BITS - s.begin[octet] + BITS * i / 8, lane = octet / 4;
      s.bytes[octet % 4][16 * lane + 2 * i] = (uint8_t)at;
      s.bytes[octet % 4][16 * lane + 2 * i + 1] = (uint8_t)(at < 15 ? at + 1 : 0x80);
      s.factors[8 * lane + i] = (uint16_t)(1 << (16 - BITS - BITS * i % 8));
    }
  }
  return s;
}

template <int BITS>
inline __m256i spread(const uint8_t* p, int v) {
  static constexpr Spread s = make_spread<BITS>();
  __m256i x = _mm256_loadu2_m128i((const __m128i*)(p + s.begin[4 + v]), (const __m128i*)(p + s.begin[v]));
  __m256i pairs = _mm256_shuffle_epi8(x, _mm256_load_si256((const __m256i*)s.bytes[v]));
  return _mm256_srli_epi16(_mm256_mullo_epi16(pairs, _mm256_load_si256((const __m256i*)s.factors)), 16 - BITS);
}

// The factors of the 8 sums of a chunk, of blocks of at least 32 columns: sum t covers CHUNK / 8 columns from there on,
// but for odd widths and bytes the first four cover the lower half of the chunk and the others the upper.
template <int CHUNK>
struct LanesOf : Positions<CHUNK> {
  __m256i index;
  explicit LanesOf(int64_t block) : Positions<CHUNK>(block) {
    __m256i column = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(CHUNK / 8));
    index = _mm256_srl_epi32(column, _mm_cvtsi32_si128(this->bits));
  }
  template <int BLOCKS>
  inline F take(const float* factors) const {
    if constexpr (BLOCKS == 1) return set1(*factors);
    if constexpr (BLOCKS == 2) {
      __m256i both = _mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i*)factors));
      return _mm256_permutevar_ps(_mm256_castsi256_ps(both), index);
    }
    return _mm256_permutevar_ps(_mm256_broadcast_ps((const __m128*)factors), index);
  }
};

// 8 partial sums of V vectors of 16-bit words times q.
template <int V>
inline F words_mac(const __m256i* words, const uint8_t* q) {
  __m256i sums = _mm256_setzero_si256();
  unroll<V>([&](auto v) INLINE { sums = dot_words(sums, words[v], _mm256_loadu_si256((const __m256i*)(q + 32 * v))); });
  return _mm256_cvtepi32_ps(sums);
}

// Codes and q as words, or both as bytes (as_bytes), q of two bytes as two planes then.
template <int WIDTH, int Q>
struct Integer {
  static constexpr int BITS = WIDTH;
  static constexpr float HALF = 1 << (BITS - 1), unit = 1;
  static constexpr bool AS_BYTES = as_bytes(BITS, Q);
  static constexpr int CHUNK = BITS == 2 ? 128 : 64;
  static constexpr int BYTES = CHUNK * (AS_BYTES ? Q : 2);
  static constexpr int VECTORS = CHUNK / (AS_BYTES ? 32 : 16);
  using Lanes = LanesOf<CHUNK>;

  explicit Integer(const IntegerLevels&) {}

  struct Codes {
    __m256i v[4];
  };
  inline Codes codes(const uint8_t* p) const {
    Codes c;
    if constexpr (BITS == 8) {
      unroll<2>([&](auto h) INLINE {
        __m256i x = _mm256_loadu2_m128i((const __m128i*)(p + 32 + 16 * h), (const __m128i*)(p + 16 * h));
        if constexpr (AS_BYTES) {
          c.v[h] = x;
        } else {
          c.v[2 * h] = _mm256_and_si256(x, _mm256_set1_epi16(255)), c.v[2 * h + 1] = _mm256_srli_epi16(x, 8);
        }
      });
    } else if constexpr (BITS == 2 || BITS == 4) {
      constexpr int LANE = AS_BYTES ? 8 : 16;  // bits that hold one code in the end
      const __m256i mask = AS_BYTES ? _mm256_set1_epi8((1 << BITS) - 1) : _mm256_set1_epi16((1 << BITS) - 1);
      __m256i x = _mm256_loadu_si256((const __m256i*)p);
      unroll<VECTORS>([&](auto v) INLINE {
        c.v[v] = _mm256_srli_epi16(x, BITS * v);
        if (LANE == 8 || v < VECTORS - 1) c.v[v] = _mm256_and_si256(c.v[v], mask);
      });
    } else {
      unroll<4>([&](auto v) INLINE { c.v[v] = spread<BITS>(p, v); });
    }
    return c;
  }
  inline Codes codes_part(const uint8_t* p, int64_t bytes) const {
    if (bytes == CHUNK * BITS / 8) return codes(p);
    uint8_t whole[CHUNK * BITS / 8] = {};
    __builtin_memcpy(whole, p, bytes);
    return codes(whole);
  }

  // Column of a chunk that code i of vector v belongs to.
  static constexpr int column(int v, int i) {
    if (BITS == 8) return AS_BYTES ? 16 * v + i % 16 + i / 16 * 32 : v / 2 * 16 + i / 8 * 32 + 2 * (i % 8) + v % 2;
    return BITS == 2 || BITS == 4 ? VECTORS * i + v : 8 * v + i % 8 + i / 8 * 32;
  }
  static inline void arrange(const int16_t* q, uint8_t* out) {
    if constexpr (AS_BYTES) {
      int8_t *high = (int8_t*)out, *low = high + CHUNK * (Q - 1);  // q = 256 * high + low, or low alone
      for (int v = 0; v < VECTORS; v++) {
        for (int i = 0; i < 32; i++) {
          int16_t value = q[column(v, i)];
          if constexpr (Q == 2) high[32 * v + i] = (int8_t)((value + 128) >> 8);
          low[32 * v + i] = (int8_t)value;
        }
      }
    } else {
      int16_t* to = (int16_t*)out;
      for (int v = 0; v < VECTORS; v++) {
        for (int i = 0; i < 16; i++) to[16 * v + i] = q[column(v, i)];
      }
    }
  }

  // 8 partial sums of codes * q.
  static inline F mac(const Codes& c, const uint8_t* q) {
    if constexpr (AS_BYTES) return _mm256_cvtepi32_ps(dot_planes<VECTORS, Q>(c.v, q));
    return words_mac<CHUNK / 16>(c.v, q);
  }
};

// Levels as 16 bits: bytes of 32 low nibbles, then of 32 high ones, are looked up and interleaved.
struct Codebook {
  static constexpr int BITS = 4, CHUNK = 64, BYTES = 128;
  static constexpr float HALF = 0;
  using Lanes = LanesOf<CHUNK>;
  __m256i low, high;  // bytes of the levels
  float unit;

  explicit Codebook(const IntegerLevels& levels) : unit(levels.unit) {
    __m256i words = _mm256_load_si256((const __m256i*)levels.value);
    const __m256i split =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    __m256i bytes = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(words, split), 0xd8);
    low = _mm256_permute2x128_si256(bytes, bytes, 0x00), high = _mm256_permute2x128_si256(bytes, bytes, 0x11);
  }

  struct Codes {
    __m256i v[4];
  };
  inline Codes codes(const uint8_t* p) const {
    Codes c;
    __m256i x = _mm256_loadu_si256((const __m256i*)p);
    unroll<2>([&](auto h) INLINE {
      __m256i nibbles = _mm256_and_si256(_mm256_srli_epi16(x, 4 * h), _mm256_set1_epi8(15));
      __m256i lower = _mm256_shuffle_epi8(low, nibbles), upper = _mm256_shuffle_epi8(high, nibbles);
      c.v[2 * h] = _mm256_unpacklo_epi8(lower, upper), c.v[2 * h + 1] = _mm256_unpackhi_epi8(lower, upper);
    });
    return c;
  }
  inline Codes codes_part(const uint8_t* p, int64_t bytes) const {
    if (bytes == 32) return codes(p);
    uint8_t whole[32] = {};
    __builtin_memcpy(whole, p, bytes);
    return codes(whole);
  }
  static inline void arrange(const int16_t* q, uint8_t* out) {
    int16_t* to = (int16_t*)out;
    for (int v = 0; v < 4; v++) {
      for (int i = 0; i < 16; i++) to[16 * v + i] = q[2 * (i / 8 * 16 + v % 2 * 8 + i % 8) + v / 2];
    }
  }
  static inline F mac(const Codes& c, const uint8_t* q) { return words_mac<4>(c.v, q); }
};

#include "body.inc.h"

using Words = __m256i;
inline Words load_words(const uint8_t* p, int64_t bytes) {
  if (bytes >= 32) return _mm256_loadu_si256((const __m256i*)p);
  alignas(32) uint8_t whole[32] = {};
  __builtin_memcpy(whole, p, bytes);
  return _mm256_load_si256((const __m256i*)whole);
}

template <int MANTISSA>
inline INLINE void halves(Words words, F* out) {
  __m256i byte[2] = {_mm256_slli_epi16(words, 8), words};
  unroll<2>([&](auto b) INLINE {
    if constexpr (MANTISSA == 3) byte[b] = _mm256_srai_epi16(byte[b], 1);
    byte[b] = _mm256_and_si256(byte[b], _mm256_set1_epi16((short)(MANTISSA == 3 ? 0xbf80 : 0xff00)));
    out[b] = _mm256_cvtph_ps(_mm256_castsi256_si128(byte[b]));
    out[2 + b] = _mm256_cvtph_ps(_mm256_extracti128_si256(byte[b], 1));
  });
}

struct Largest {  // twice each byte, so without its sign
  __m256i most = _mm256_setzero_si256();
  inline void see(Words words) { most = _mm256_max_epu8(most, _mm256_add_epi8(words, words)); }
  inline bool reaches(int magnitude) const {
    __m256i limit = _mm256_set1_epi8((char)(2 * magnitude));
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(most, limit), most)) != 0;
  }
};

#include "float8.inc.h"

using Ints = __m256i;
inline Ints set1_ints(int32_t v) { return _mm256_set1_epi32(v); }
inline Ints load_ints(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Ints high_and_low(Ints high, Ints low) { return _mm256_add_epi32(_mm256_slli_epi32(high, 8), low); }
inline F to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }

#include "integer_gemm.inc.h"

// --- the table ---

// Below these, decoding every row again for four tokens at a time is faster.
bool tile2(const Job& j) { return j.m >= (is_integer(j) ? 16 : j.format->kind == ZP_CODEBOOK ? 40 : 12); }

double peak(int32_t what, int64_t repeats) { return what == ZP_PEAK_FLOAT32 ? peak_float(repeats) : 0; }
