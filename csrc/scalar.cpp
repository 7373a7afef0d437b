// Plain C++: what every other instruction set is compared with, and what runs where there is none of them.
#include "kernels.h"
#include "unroll.h"

namespace zp {
namespace {

constexpr int W = 1;
constexpr int TILE_N = 4;
constexpr int TILE_V = 4;
using F = float;

inline float from_bits(uint32_t bits) {
  float v;
  __builtin_memcpy(&v, &bits, 4);
  return v;
}
inline uint32_t to_bits(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  return bits;
}
static inline float scalar_f16(uint16_t h);
static inline float scalar_bf16(uint16_t h);

inline F zero() { return 0; }
inline F set1(float v) { return v; }
inline F load(const float* p) { return *p; }
inline void store(float* p, F v) { *p = v; }
inline F add(F a, F b) { return a + b; }
inline F sub(F a, F b) { return a - b; }
inline F mul(F a, F b) { return a * b; }
inline F div(F a, F b) { return a / b; }
inline F fma(F a, F b, F c) { return a * b + c; }
inline F abs_max(F a, F b) {
  float magnitude = __builtin_fabsf(b);
  return magnitude <= a || a != a ? a : magnitude;  // a NaN stays, of either
}
inline F min(F a, F b) { return a < b ? a : b; }  // b where either is a NaN
inline F max(F a, F b) { return a > b ? a : b; }
inline float smallest(F a) { return a; }
inline float highest(F a) { return a; }
inline void store_u8(uint8_t* p, F v) { *p = (uint8_t)v; }
inline void store_nearest16(uint8_t* p, F v, const float* midpoint, const uint8_t* code) {
  int below = 0;
  for (int i = 0; i < 15; i++) below += v > midpoint[i];
  *p = code[below];
}
inline F round_even(F a) { return __builtin_rintf(a); }
inline float sum(F a) { return a; }
inline void transpose(F*) {}
inline void sum4(F a, F b, F c, F d, float* out) { out[0] = a, out[1] = b, out[2] = c, out[3] = d; }
inline float largest(F a) { return a; }
inline F load_u8(const uint8_t* p) { return *p; }
inline F load_i8(const int8_t* p) { return *p; }
inline F load_f16(const uint16_t* p) { return scalar_f16(*p); }
inline F load_part(const float*, int64_t) { return 0; }  // never part of one
inline F load_f16_part(const uint16_t*, int64_t, bool) { return 0; }
inline F load_i8_part(const int8_t*, int64_t, bool) { return 0; }
inline F load_e8m0_part(const uint8_t*, int64_t, bool) { return 0; }
inline F lookup256_part(const float* levels, const uint8_t* p, int64_t) { return levels[*p]; }
inline F load_bf16(const uint16_t* p) { return scalar_bf16(*p); }
static inline float e4m3(uint8_t c);
inline F load_e5m2(const uint8_t* p) { return scalar_f16((uint16_t)(*p << 8)); }
static inline float scalar_e8m0(uint8_t exponent);
inline F load_e8m0(const uint8_t* p) { return scalar_e8m0(*p); }
inline F load_e4m3(const uint8_t* p) { return e4m3(*p); }
inline void store_f16(uint16_t* p, F v) {
  uint32_t bits = to_bits(v), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) {
    *p = (uint16_t)(sign | 0x7e00);
  } else if (rest < 0x38800000) {  // below 2^-14: adding 2^-1 leaves the rounded subnormal in the low bits
    *p = (uint16_t)(sign | (to_bits(from_bits(rest) + 0.5f) - to_bits(0.5f)));
  } else {
    uint32_t rounded = (rest + 0xfff + (rest >> 13 & 1) - ((127 - 15) << 23)) >> 13;
    *p = (uint16_t)(sign | (rounded > 0x7c00 ? 0x7c00 : rounded));
  }
}
inline void store_bf16(uint16_t* p, F v) {
  uint32_t bits = to_bits(v);
  *p = v != v ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void store_i16(int16_t* p, F v) { *p = (int16_t)v; }
inline F lookup16(const float* levels, const uint8_t* codes) { return levels[*codes & 15]; }

inline bool fetches_soon() { return false; }

#include "spread.inc.h"

inline void unpack(const uint8_t* p, int bits, int64_t count, uint8_t* out) {
  by_bits<UnpackOctets>(bits, p, count, out);
}

// Sums of 32 codes, as 16 bits, times q.
struct Scalar {
  static constexpr int CHUNK = 32, BYTES = 64;
  struct Codes {
    int16_t v[CHUNK];
  };
  static inline void arrange(const int16_t* q, uint8_t* out) { __builtin_memcpy(out, q, BYTES); }
  static inline F mac(const Codes& c, const uint8_t* q) {
    const int16_t* x = (const int16_t*)q;
    int32_t total = 0;
    for (int i = 0; i < CHUNK; i++) total += c.v[i] * x[i];
    return (float)total;
  }
  struct Lanes : Positions<CHUNK> {
    explicit Lanes(int64_t block) : Positions<CHUNK>(block) {}
    template <int>
    inline F take(const float* factors) const {
      return *factors;
    }
  };
};

template <int WIDTH, int Q>
struct Integer : Scalar {
  static constexpr int BITS = WIDTH;
  static constexpr float HALF = 1 << (BITS - 1), unit = 1;
  explicit Integer(const IntegerLevels&) {}
  inline Codes codes(const uint8_t* p) const { return codes_part(p, CHUNK * BITS / 8); }
  inline Codes codes_part(const uint8_t* p, int64_t bytes) const {
    uint8_t whole[CHUNK * BITS / 8] = {}, octets[CHUNK];
    __builtin_memcpy(whole, p, bytes);
    unpack_octets<BITS>(whole, CHUNK, octets);
    Codes c;
    for (int i = 0; i < CHUNK; i++) c.v[i] = octets[i];
    return c;
  }
};

struct Codebook : Scalar {
  static constexpr int BITS = 4;
  static constexpr float HALF = 0;
  IntegerLevels levels;
  float unit;
  explicit Codebook(const IntegerLevels& integers) : levels(integers), unit(integers.unit) {}
  inline Codes codes(const uint8_t* p) const { return codes_part(p, CHUNK / 2); }
  inline Codes codes_part(const uint8_t* p, int64_t bytes) const {
    Codes c = {};
    for (int64_t i = 0; i < bytes; i++) c.v[2 * i] = levels.value[p[i] & 15], c.v[2 * i + 1] = levels.value[p[i] >> 4];
    return c;
  }
};

#include "body.inc.h"

double peak(int32_t what, int64_t repeats) { return what == ZP_PEAK_FLOAT32 ? peak_float(repeats) : 0; }

}  // namespace

extern const Isa scalar;
const Isa scalar = {"scalar", tile,      tokens, prepared_bytes, prepare, rows,    scratch_bytes, multiply, decode,
                    encode,   normalize, gate,   rotate,         nullptr, nullptr, read,          peak};

}  // namespace zp
