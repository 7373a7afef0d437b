// Rows of any format as bfloat16, for AVX512 with BF16 and VBMI. Included by avx512_bf16.cpp and amx.cpp after
// avx512.inc.h.

// 32 values as bfloat16, or as the sum of two: what the first leaves is the second, which leaves 2^-18 of a value.
template <int PARTS>
struct Words32 {
  __m512i part[PARTS];
  inline INLINE void write(void* out) const {  // one vector after the other
    unroll<PARTS>([&](auto p) INLINE { _mm512_storeu_si512((uint8_t*)out + 64 * p, part[p]); });
  }
};

inline F lower_half(__m512i words) { return from_bf16(_mm512_castsi512_si256(words)); }
inline F upper_half(__m512i words) { return from_bf16(_mm512_extracti64x4_epi64(words, 1)); }

inline INLINE F within_bfloat16(F v) {  // so that rounding does not make it infinite; a NaN stays
  const F most = _mm512_castsi512_ps(_mm512_set1_epi32(0x7f7f0000));
  return max(sub(zero(), most), min(most, v));
}

template <int PARTS>
inline INLINE Words32<PARTS> rounded(F low, F high) {
  if constexpr (PARTS == 1) {
    return {{(__m512i)_mm512_cvtne2ps_pbh(high, low)}};
  } else {
    __m512i first = (__m512i)_mm512_cvtne2ps_pbh(within_bfloat16(high), within_bfloat16(low));
    F rest[2] = {sub(low, lower_half(first)), sub(high, upper_half(first))};
    return {{first, (__m512i)_mm512_cvtne2ps_pbh(rest[1], rest[0])}};
  }
}

template <int PARTS>
inline INLINE Words32<PARTS> rounded_twice(F values) {  // both halves are the same
  if constexpr (PARTS == 1) {
    return {{(__m512i)_mm512_cvtne2ps_pbh(values, values)}};
  } else {
    F within = within_bfloat16(values);
    __m512i first = (__m512i)_mm512_cvtne2ps_pbh(within, within);
    F rest = sub(values, lower_half(first));
    return {{first, (__m512i)_mm512_cvtne2ps_pbh(rest, rest)}};
  }
}

// 32 bfloat16 times a scale.
template <int PARTS>
inline Words32<PARTS> times(__m512i words, F scale) {
  return rounded<PARTS>(mul(lower_half(words), scale), mul(upper_half(words), scale));
}

// The same with a power of two between 2^-117 and 2^119, which float8 values take without rounding: exponents are
// added, but for those of 0, Inf and NaN.
inline __m512i times_power(__m512i words, int exponent) {
  __m512i magnitude = _mm512_and_si512(words, _mm512_set1_epi16(0x7fff)), one = _mm512_set1_epi16(1);
  __mmask32 numbers = _mm512_cmplt_epu16_mask(_mm512_sub_epi16(magnitude, one), _mm512_set1_epi16(0x7f7f));
  return _mm512_mask_add_epi16(words, numbers, words, _mm512_set1_epi16((short)(exponent * 128)));
}

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

struct Float8Words {  // 64 codes -> bfloat16, two vectors of 32
  __m512i upper[2], lower[2];
  explicit Float8Words(const zp_format& f) {
    static constexpr Float8Table e4m3fn = make_float8(3, 7, false), e5m2 = make_float8(2, 15, true);
    const Float8Table& table = f.kind == ZP_FLOAT8_E4M3FN ? e4m3fn : e5m2;
    for (int i = 0; i < 2; i++) {
      upper[i] = _mm512_load_si512(table.upper + 64 * i), lower[i] = _mm512_load_si512(table.lower + 64 * i);
    }
  }
  inline INLINE void operator()(const uint8_t* p, int64_t count, __m512i* words) const {  // past count: zeros
    const __m512i halves = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // interleaved, they are in order
    __m512i c = _mm512_permutexvar_epi64(halves, _mm512_maskz_loadu_epi8(first(count), p));
    __m512i sign = _mm512_and_si512(c, _mm512_set1_epi8((char)0x80));
    __m512i high = _mm512_or_si512(_mm512_permutex2var_epi8(upper[0], c, upper[1]), sign);
    __m512i low = _mm512_permutex2var_epi8(lower[0], c, lower[1]);
    words[0] = _mm512_unpacklo_epi8(low, high);
    words[1] = _mm512_unpackhi_epi8(low, high);
  }
};

constexpr int64_t MOST = 1024;  // columns decoded in one call

// Of groups [first, first + count) of a row; offset: what is subtracted from a code. Written to whole vectors.
inline void grids(const zp_weight& w, int64_t row, int64_t first, int64_t count, float* scale, float* offset) {
  const zp_format& f = *w.format;
  int64_t at = row * f.scale_stride + first;
  F half = f.kind == ZP_INTEGER ? set1((float)(1 << (f.bits - 1))) : zero();
  for (int64_t g = 0; g < count; g += W) {
    store(scale + g, scales_at(f, f.scale_dtype, w.scale, at + g, count - g, false));
    F zero_point = w.zero_point ? zero_points_at(w.zero_point, f.float_zero_point, at + g, count - g, false) : zero();
    store(offset + g, add(half, zero_point));
  }
}

// Where codes of BITS bits lie: lanes of LANE bytes get the two bytes that a code is in, and how far it is shifted
// there.
template <int BITS, int LANE>
struct Places {
  alignas(64) uint8_t byte[64] = {};
  alignas(64) uint8_t shift[64] = {};
  constexpr Places() {
    for (int i = 0; i < 64 / LANE; i++) {
      byte[LANE * i] = (uint8_t)(BITS * i / 8), byte[LANE * i + 1] = (uint8_t)(BITS * i / 8 + 1);
      shift[LANE * i] = (uint8_t)(BITS * i % 8);
    }
  }
};

// 32 values at a time of what a group's codes stand for. Up to 32 of them are scaled and rounded once, and codes looked
// up among them; of more bits, each code is.
template <int BITS, int PARTS>
struct Narrow {  // up to 5 bits
  static constexpr Places<BITS, 2> places{};
  const uint8_t* packed;
  F levels, upper;  // of codes 0 .. 31, of which the lowest BITS bits count
  using Words = Words32<PARTS>;
  inline INLINE Words table(F scale, F offset) const {
    if constexpr (BITS < 5) return rounded_twice<PARTS>(mul(sub(levels, offset), scale));
    return rounded<PARTS>(mul(sub(levels, offset), scale), mul(sub(upper, offset), scale));
  }
  inline INLINE Words next(const Words& table, F, F) {
    __m512i bytes = _mm512_castsi256_si512(_mm256_maskz_loadu_epi8((1u << 4 * BITS) - 1, packed));
    packed += 4 * BITS;
    bytes = _mm512_permutexvar_epi8(_mm512_load_si512(places.byte), bytes);
    bytes = _mm512_srlv_epi16(bytes, _mm512_load_si512(places.shift));
    Words words;
    unroll<PARTS>([&](auto p) INLINE { words.part[p] = _mm512_permutexvar_epi16(bytes, table.part[p]); });
    return words;
  }
};

template <int BITS, int PARTS>
struct Wide {  // 6, 7 and 8 bits
  static constexpr Places<BITS, 4> places{};
  const uint8_t* packed;
  using Words = Words32<PARTS>;
  inline INLINE Words table(F, F) const { return Words(); }
  inline INLINE F codes(const uint8_t* p) const {
    if constexpr (BITS == 8) return load_u8(p);
    __m512i bytes = _mm512_castsi128_si512(_mm_maskz_loadu_epi8((1u << 2 * BITS) - 1, p));
    bytes = _mm512_permutexvar_epi8(_mm512_load_si512(places.byte), bytes);
    bytes = _mm512_srlv_epi32(bytes, _mm512_load_si512(places.shift));
    return _mm512_cvtepi32_ps(_mm512_and_si512(bytes, _mm512_set1_epi32((1 << BITS) - 1)));
  }
  inline INLINE Words next(const Words&, F scale, F offset) {
    F low = mul(sub(codes(packed), offset), scale), high = mul(sub(codes(packed + 2 * BITS), offset), scale);
    packed += 4 * BITS;
    return rounded<PARTS>(low, high);
  }
};

// left: vectors of the first group, of which some may have come before; of the others per_group.
template <class Codes>
inline INLINE void decode_groups(Codes codes, int64_t vectors, int64_t left, int64_t per_group, const float* scale,
                                 const float* offset, uint16_t* out) {
  for (; vectors > 0; left = per_group, scale++, offset++) {
    F s = set1(*scale), o = set1(*offset);
    auto table = codes.table(s, o);
    int64_t some = left < vectors ? left : vectors;
    vectors -= some;
    do {
      auto words = codes.next(table, s, o);
      words.write(out);
      out += sizeof(words) / 2;
    } while (--some);
  }
}

template <int PARTS>
struct DecodeCodes {  // integers and codebooks
  template <int BITS>
  struct Of {
    static void call(const zp_weight* w, int64_t row, int64_t k0, int64_t count, const float* scale,
                     const float* offset, uint16_t* out) {
      const zp_format& f = *w->format;
      alignas(64) float own[16];
      alignas(64) uint8_t last[MOST * BITS / 8 + 64];
      const uint8_t* p = w->packed + row * packed_row_bytes(f) + k0 * BITS / 8;
      int64_t vectors = (count + 31) / 32, left = (f.group_size - k0 % f.group_size + 31) / 32,
              per_group = f.group_size / 32;
      if (count % 32) {  // whole vectors are read
        __builtin_memcpy(last, p, (count * BITS + 7) / 8);
        p = last;
      }
      if constexpr (BITS <= 5) {
        constexpr int CODES = 1 << BITS;
        __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        F levels = _mm512_cvtepi32_ps(_mm512_and_si512(lane, _mm512_set1_epi32(CODES - 1)));
        if (f.kind == ZP_CODEBOOK) levels = load(levels_of(*w, row, own));
        F upper = CODES > W ? add(levels, set1(W)) : levels;
        decode_groups(Narrow<BITS, PARTS>{p, levels, upper}, vectors, left, per_group, scale, offset, out);
      } else {
        decode_groups(Wide<BITS, PARTS>{p}, vectors, left, per_group, scale, offset, out);
      }
    }
  };
};

// scaled: false for a row whose one scale is left out.
template <int PARTS>
inline void decode_float8(const zp_weight& w, int64_t row, int64_t k0, int64_t count, const float* scale, bool scaled,
                          Ahead ahead, uint16_t* out) {
  const zp_format& f = *w.format;
  const Float8Words decode(f);
  const uint8_t* packed = w.packed + row * f.k + k0;
  int64_t left = f.group_size - k0 % f.group_size;
  for (int64_t at = 0; at < count; at += 64) {
    __m512i words[2];
    fetch<64>(packed + at, ahead);
    decode(packed + at, count - at, words);
    unroll<2>([&](auto h) INLINE {
      int64_t k = at + 32 * h;
      if (k >= count) return;
      Words32<PARTS> values = {{words[h]}};
      if (scaled) {
        float s = *scale;
        uint32_t bits;
        __builtin_memcpy(&bits, &s, 4);
        int exponent = (int)(bits >> 23) - 127;
        bool power = f.scale_dtype == ZP_E8M0 && exponent >= -117 && exponent <= 119;
        if (power) {
          values.part[0] = times_power(words[h], exponent);
        } else {
          values = times<PARTS>(words[h], set1(s));
        }
        if ((left -= 32) <= 0) left = f.group_size, scale++;
      }
      values.write(out + k * PARTS);
    });
  }
}

// One scale for a whole row, which the sum of products can take as well.
inline bool scaled_by_row(const zp_format& f) {
  return f.kind != ZP_BFLOAT16 && f.kind != ZP_FLOAT16 && f.group_size >= f.k;
}

// Formats of which decode_bfloat16 fetches what lies ahead, a line with each that it decodes: codes take less than a
// line at a time.
inline bool fetched_by_lines(const zp_format& f) { return f.bits == 16 || is_float8(f); }

// Columns [k0, k1) of a row, at most MOST of them, and zeros up to whole vectors of 32. k0 is a multiple of 32 and so
// are groups, but for one that is the whole row. scaled: false leaves out the scale of a row that has only one. Of two
// PARTS, both of 32 columns come before the next.
template <int PARTS = 1>
inline INLINE void decode_bfloat16(const zp_weight& w, int64_t row, int64_t k0, int64_t k1, bool scaled, uint16_t* out,
                                   Ahead ahead = {}) {
  const zp_format& f = *w.format;
  int64_t count = k1 - k0;
  if (f.kind == ZP_BFLOAT16 || f.kind == ZP_FLOAT16) {
    const uint16_t* p = (const uint16_t*)w.packed + row * f.k + k0;
    for (int64_t i = 0; i < count; i += 32) {
      fetch<64>(p + i, ahead);
      __m512i words = _mm512_maskz_loadu_epi16(count - i >= 32 ? ~0u : (1u << (count - i)) - 1, p + i);
      Words32<PARTS> values = {{words}};
      if (f.kind == ZP_FLOAT16) {
        F low = _mm512_cvtph_ps(_mm512_castsi512_si256(words));
        values = rounded<PARTS>(low, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1)));
      }
      values.write(out + i * PARTS);
    }
    return;
  }
  alignas(64) float scales[MOST / 32 + 2 * W], offsets[MOST / 32 + 2 * W];
  int64_t first_group = k0 / f.group_size;
  grids(w, row, first_group, (k1 - 1) / f.group_size - first_group + 1, scales, offsets);
  if (is_float8(f)) {
    decode_float8<PARTS>(w, row, k0, count, scales, scaled, ahead, out);
  } else {
    if (!scaled) scales[0] = 1;
    by_bits<DecodeCodes<PARTS>::template Of>(f.bits, &w, row, k0, count, (const float*)scales, (const float*)offsets,
                                             out);
    for (int64_t i = count; i % 32; i++) {
      unroll<PARTS>([&](auto p) INLINE { out[i / 32 * 32 * PARTS + 32 * p + i % 32] = 0; });
    }
  }
}
