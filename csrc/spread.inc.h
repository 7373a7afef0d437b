// Codes: eight at a time between BITS bytes and eight bytes; levels of a codebook as integers; where the factors of a
// chunk of codes lie. Included inside each instruction set's namespace, as body.inc.h is.

// The lowest `bits` bits of every `lane` bits.
constexpr uint64_t lanes_of(int bits, int lane) {
  uint64_t one = bits >= 64 ? ~0ull : (1ull << bits) - 1, all = 0;
  for (int at = 0; at < 64; at += lane) all |= one << at;
  return all;
}

// Packed octet -> bytes, by doubling: halves of 4 codes into 32 bits each, then pairs into 16, then codes into 8.
template <int BITS>
static inline uint64_t spread_octet(uint64_t x) {
#ifdef __BMI2__
  return _pdep_u64(x, lanes_of(BITS, 8));
#else
  constexpr uint64_t low = (1ull << 4 * BITS) - 1;
  constexpr uint64_t pairs = lanes_of(2 * BITS, 32), codes = lanes_of(BITS, 16);
  x = (x & low) | (x & ~low) << (32 - 4 * BITS);
  x = (x & pairs) | (x & ~pairs & lanes_of(4 * BITS, 32)) << (16 - 2 * BITS);
  return (x & codes) | (x & ~codes & lanes_of(2 * BITS, 16)) << (8 - BITS);
#endif
}

// Inverse.
template <int BITS>
static inline uint64_t gather_octet(uint64_t x) {
#ifdef __BMI2__
  return _pext_u64(x, lanes_of(BITS, 8));
#else
  constexpr uint64_t even = lanes_of(BITS, 16), pairs = lanes_of(2 * BITS, 32);
  x = (x & even) | (x & even << 8) >> (8 - BITS);
  x = (x & pairs) | (x & pairs << 16) >> (16 - 2 * BITS);
  return (x & 0xffffffffull) | (x >> 32) << 4 * BITS;
#endif
}

// count codes (in whole octets, so up to 7 bytes more are written) from ceil(count * BITS / 8) bytes.
template <int BITS>
static inline void unpack_octets(const uint8_t* p, int64_t count, uint8_t* out) {
  if constexpr (BITS == 8) {
    __builtin_memcpy(out, p, count);
    return;
  }
  int64_t i = 0;
  uint64_t x;
  for (; i < count / 8 * 8; i += 8, p += BITS) {
    x = 0;
    __builtin_memcpy(&x, p, BITS);
    x = spread_octet<BITS>(x);
    __builtin_memcpy(out + i, &x, 8);
  }
  if (count % 8) {
    x = 0;
    __builtin_memcpy(&x, p, ((count - i) * BITS + 7) / 8);
    x = spread_octet<BITS>(x);
    __builtin_memcpy(out + i, &x, 8);
  }
}

// Inverse; the last byte's unused bits are 0.
template <int BITS>
static inline void pack_octets(const uint8_t* codes, int64_t count, uint8_t* out) {
  if constexpr (BITS == 8) {
    __builtin_memcpy(out, codes, count);
    return;
  }
  int64_t i = 0;
  if constexpr (BITS == 4) {  // which the compiler makes vectors of
    for (; i < count / 8 * 4; i++) out[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
    out += i, i *= 2;
  }
  uint64_t x;
  for (; i < count / 8 * 8; i += 8, out += BITS) {
    __builtin_memcpy(&x, codes + i, 8);
    x = gather_octet<BITS>(x);
    __builtin_memcpy(out, &x, BITS);
  }
  if (count % 8) {
    x = 0;
    __builtin_memcpy(&x, codes + i, count - i);
    x = gather_octet<BITS>(x);
    __builtin_memcpy(out, &x, ((count - i) * BITS + 7) / 8);
  }
}

// One instance of a template for each width of code.
template <template <int> class Function, class... Arguments>
static inline auto by_bits(int bits, Arguments... arguments) {
  switch (bits) {
    case 2: return Function<2>::call(arguments...);
    case 3: return Function<3>::call(arguments...);
    case 4: return Function<4>::call(arguments...);
    case 5: return Function<5>::call(arguments...);
    case 6: return Function<6>::call(arguments...);
    case 7: return Function<7>::call(arguments...);
    default: return Function<8>::call(arguments...);
  }
}

template <int BITS>
struct UnpackOctets {
  static void call(const uint8_t* p, int64_t count, uint8_t* out) { unpack_octets<BITS>(p, count, out); }
};
template <int BITS>
struct PackOctets {
  static void call(const uint8_t* codes, int64_t count, uint8_t* out) { pack_octets<BITS>(codes, count, out); }
};

static inline void pack(const uint8_t* codes, int bits, int64_t count, uint8_t* out) {
  by_bits<PackOctets>(bits, codes, count, out);
}

// level = unit * value, up to half a unit, which is at most 2^-14 of the largest level (2^-15 where that is a power of
// two). unit is a power of two: levels that are small integers times one stay exact.
struct IntegerLevels {
  alignas(32) int16_t value[16] = {};
  float unit;
  explicit IntegerLevels(const float* level) {
    F most = zero();
    for (int c = 0; c < 16; c += W) most = abs_max(most, load(level + c));
    float top = largest(most), per_unit;  // a NaN stays
    uint32_t bits, exponent;
    __builtin_memcpy(&bits, &top, 4);
    exponent = (bits >> 23) + ((bits & 0x7fffff) != 0);  // of the power of two at or above top
    if (exponent < 20 || exponent > 254) {
      unit = top == 0 ? 1.0f : __builtin_nanf("");
      return;
    }
    bits = (exponent - 14) << 23;
    __builtin_memcpy(&unit, &bits, 4);
    bits = (254 + 14 - exponent) << 23;
    __builtin_memcpy(&per_unit, &bits, 4);
    for (int c = 0; c < 16; c += W) store_i16(value + c, round_even(mul(load(level + c), set1(per_unit))));
  }
};

// Where the factors of each CHUNK columns begin among those of the blocks of a row.
template <int CHUNK>
struct Positions {
  static constexpr int MOST = CHUNK / 32 > 1 ? CHUNK / 32 : 1;  // blocks of a chunk, none shorter than 32 columns
  int bits;                                                     // block = 2^bits
  int64_t step;                                                 // from a chunk of even number to the next
  explicit Positions(int64_t block) : bits(__builtin_ctzll(block)), step((int64_t)CHUNK >> bits) {}
  inline int64_t first(int64_t chunk) const { return chunk * CHUNK >> bits; }
  // f(how many blocks a chunk has): 1, 2 or 4.
  template <class Function>
  inline INLINE void by_blocks(const Function& f) const {
    if (MOST >= 4 && step == 4) return f(Index<MOST >= 4 ? 4 : 1>());
    if (MOST >= 2 && step == 2) return f(Index<MOST >= 2 ? 2 : 1>());
    f(Index<1>());
  }
};
