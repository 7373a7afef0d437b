// Attention of many bfloat16 tokens by tiles. Included by amx.cpp.
//
//   S (16 tokens, 16 keys) += Q (16 tokens, 32 of the width) * K^T, as it is arranged
//   Y (16 tokens, 16 of the width) += P (16 tokens, 32 keys) * V, as it is arranged
//
// 32 tokens of a head at a time take KEYS_AT_ONCE keys after KEYS_AT_ONCE (Dao et al. 2022, algorithm 1).

constexpr int64_t KEYS_AT_ONCE = 256;

bool takes_tiles(const zp_attention& a) { return a.dtype == ZP_BF16 && a.width % 32 == 0; }

int64_t padded_length(const zp_attention& a) { return round_up(a.length, PAIR); }

// [sequence][kv_head]: keys [16 keys][32 of the width], then values [32 keys][16 of the width], each a tile.
int64_t arranged_head_bytes(const zp_attention& a) { return 2 * padded_length(a) * a.width * 2; }

int64_t arranged_bytes(const zp_attention& a) { return a.batch * a.kv_heads * arranged_head_bytes(a); }

int64_t arrangements(const zp_attention& a) { return a.batch * a.kv_heads * padded_length(a) / PAIR; }

// 32 positions of a head.
void arrange_keys_and_values(const zp_attention& a, int64_t unit, uint8_t* arranged) {
  int64_t units = padded_length(a) / PAIR, head = unit / units, begin = unit % units * PAIR;
  int64_t sequence = head / a.kv_heads, kv_head = head % a.kv_heads;
  arranged += head * arranged_head_bytes(a);
  const auto* keys = (const uint16_t*)a.keys + sequence * a.keys_batch_stride + kv_head * a.keys_head_stride;
  const auto* values = (const uint16_t*)a.values + sequence * a.values_batch_stride + kv_head * a.values_head_stride;
  auto* out = (float*)(arranged + begin * a.width * 2);
  for (int64_t half = begin; half < begin + PAIR; half += SIDE) {
    for (int64_t d = 0; d < a.width; d += PAIR, out += SIDE * SIDE) {
      F words[SIDE];
      unroll<SIDE>([&](auto i) INLINE {
        words[i] = half + i < a.length ? load((const float*)(keys + (half + i) * a.width + d)) : zero();
      });
      transpose(words);
      unroll<SIDE>([&](auto i) INLINE { store(out + i * SIDE, words[i]); });
    }
  }
  auto* pairs = (__m512i*)(arranged + (padded_length(a) + begin) * a.width * 2);
  for (int64_t d = 0; d < a.width; d += SIDE) {
    for (int64_t i = begin; i < begin + PAIR; i += 2) {
      auto value = [&](int64_t j) INLINE {
        __mmask16 there = j < a.length ? 0xffff : 0;
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, values + j * a.width + d));
      };
      *pairs++ = _mm512_or_si512(value(i), _mm512_slli_epi32(value(i + 1), 16));
    }
  }
}

int64_t token_blocks(const zp_attention& a) { return (a.tokens + PAIR - 1) / PAIR; }

int64_t blocks(const zp_attention& a) { return a.batch * a.heads * token_blocks(a); }

// A square of sums at c, of row_bytes: + rows at x, 32 columns a step, times tiles at y0 and y1.
inline INLINE void multiply_square(float* c, int64_t c_bytes, bool first, const uint8_t* x, int64_t x_bytes,
                                   const uint8_t* y0, const uint8_t* y1, int64_t y_step, int64_t steps) {
  auto at = [&](int64_t i) INLINE { return (uint8_t*)c + i / 2 * SIDE * c_bytes + i % 2 * 64; };
  unroll<4>([&](auto i) INLINE { first ? tile_zero<i>() : tile_load<i>(at(i), c_bytes); });
  for (int64_t s = 0; s < steps; s++, x += 64, y0 += y_step, y1 += y_step) {
    tile_load<4>(x, x_bytes), tile_load<5>(x + SIDE * x_bytes, x_bytes);
    tile_load_once<6>(y0, 64), tile_load_once<7>(y1, 64);
    tile_bfloat16<0, 4, 6>(), tile_bfloat16<1, 4, 7>(), tile_bfloat16<2, 5, 6>(), tile_bfloat16<3, 5, 7>();
  }
  unroll<4>([&](auto i) INLINE { tile_store<i>(at(i), c_bytes); });
}

// Of a block's rows: the largest score so far times log2(e) * scale, and the sum of 2^(score - largest); what both were
// before is worth `before` of it.
struct Rows32 {
  alignas(64) float largest[PAIR], total[PAIR], before[PAIR];
  Rows32() {
    for (int64_t row = 0; row < PAIR; row++) largest[row] = -__builtin_inff(), total[row] = 0;
  }
};

// 2^v to 2^-18 of itself, more than is kept of it, and of 0 exactly; 2^-125 below -125. v <= 0, or a NaN, which stays.
inline INLINE F power_of_2(F v) {
  constexpr float SHIFT = 0x1.8p23f + 127;  // brings the exponent's bits to the lowest
  constexpr float CURVE[] = {0x1.c9fc4ap-5f, 0x1.ec0378p-3f, 0x1.62e12cp-1f, 1.0f};
  v = max(set1(-125), v);
  F shifted = add(v, set1(SHIFT)), r = sub(v, sub(shifted, set1(SHIFT)));
  F p = set1(0x1.3a02b8p-7f);
  for (float c : CURVE) p = fma(p, r, set1(c));
  return mul(p, with_bits(bits_of(shifted) << 23));
}

inline INLINE void store_pair(uint16_t* p, F first, F second) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

// The block's scores, VECTORS of each row, become factors in bfloat16. Not its own are, unless all is SEEN, those of a
// row from seen + row on.
template <int VECTORS, bool SEEN>
void take_scores(const zp_attention& a, const float* scores, int64_t seen, Rows32& rows, uint16_t* factors) {
  const float by = a.scale * 0x1.715476p0f;
  alignas(64) float largest[PAIR], sums[PAIR];
  auto own = [&](int64_t row, int64_t i) INLINE {
    int64_t count = seen + row - i;
    return (__mmask16)(count >= W ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
  };
  for (int64_t row = 0; row < PAIR; row++) {
    const float* score = scores + row * KEYS_AT_ONCE;
    F top[2] = {set1(-__builtin_inff()), set1(-__builtin_inff())};
    unroll<VECTORS>([&](auto i) INLINE {
      F v = load(score + i * W);
      if constexpr (!SEEN) v = _mm512_mask_mov_ps(top[0], own(row, i * W), v);
      top[i % 2] = max(top[i % 2], v);
    });
    largest[row] = highest(max(top[0], top[1]));
  }
  for (int64_t row = 0; row < PAIR; row += W) {
    F before = load(rows.largest + row), now = max(before, mul(load(largest + row), set1(by)));
    store(rows.before + row, power_of_2(sub(before, now)));
    store(rows.largest + row, now);
  }
  for (int64_t row = 0; row < PAIR; row++) {
    const float* score = scores + row * KEYS_AT_ONCE;
    F shift = set1(rows.largest[row]), v[VECTORS], sum_of[2] = {zero(), zero()};
    unroll<VECTORS>([&](auto i) INLINE {
      v[i] = power_of_2(_mm512_fmsub_ps(load(score + i * W), set1(by), shift));
      if constexpr (!SEEN) v[i] = _mm512_maskz_mov_ps(own(row, i * W), v[i]);
      sum_of[i % 2] = add(sum_of[i % 2], v[i]);
    });
    sums[row] = sum(add(sum_of[0], sum_of[1]));
    unroll<VECTORS / 2>([&](auto i)
                            INLINE { store_pair(factors + row * KEYS_AT_ONCE + i * PAIR, v[2 * i], v[2 * i + 1]); });
  }
  for (int64_t row = 0; row < PAIR; row += W) {
    store(rows.total + row, fma(load(rows.total + row), load(rows.before + row), load(sums + row)));
  }
}

using TakeScores = void (*)(const zp_attention&, const float*, int64_t, Rows32&, uint16_t*);
constexpr TakeScores TAKE_SOME[KEYS_AT_ONCE / PAIR] = {
    take_scores<2, false>,  take_scores<4, false>,  take_scores<6, false>,  take_scores<8, false>,
    take_scores<10, false>, take_scores<12, false>, take_scores<14, false>, take_scores<16, false>,
};

void attend_block(const zp_attention& a, int64_t block, const uint8_t* arranged) {
  alignas(64) float scores[PAIR * KEYS_AT_ONCE], sums[PAIR * ZP_MOST_WIDTH];
  alignas(64) uint16_t factors[PAIR * KEYS_AT_ONCE], padded[PAIR * ZP_MOST_WIDTH];
  Rows32 rows;
  int64_t head = block / token_blocks(a), begin = block % token_blocks(a) * PAIR;  // head: of all sequences
  int64_t tokens = a.tokens - begin < PAIR ? a.tokens - begin : PAIR, past = a.length - a.tokens;
  int64_t width = a.width, row_bytes = width * 2, steps = width / 32;
  const auto* queries = (const uint8_t*)a.queries + (head * a.tokens + begin) * row_bytes;
  if (tokens < PAIR) {
    __builtin_memcpy(padded, queries, tokens * row_bytes);
    __builtin_memset((uint8_t*)padded + tokens * row_bytes, 0, (PAIR - tokens) * row_bytes);
    queries = (const uint8_t*)padded;
  }
  const uint8_t* keys = arranged + head / (a.heads / a.kv_heads) * arranged_head_bytes(a);
  const uint8_t* values = keys + padded_length(a) * row_bytes;
  int64_t end = past + begin + tokens;  // of what the last one sees
  tiles_begin();
  for (int64_t j = 0; j < end; j += KEYS_AT_ONCE) {
    int64_t count = end - j < KEYS_AT_ONCE ? round_up(end - j, PAIR) : KEYS_AT_ONCE;
    for (int64_t i = 0; i < count; i += PAIR) {
      const uint8_t* tile = keys + (j + i) * row_bytes;
      multiply_square(scores + i, KEYS_AT_ONCE * 4, true, queries, row_bytes, tile, tile + SIDE * row_bytes, TILE_BYTES,
                      steps);
    }
    int64_t seen = past + begin + 1 - j;  // by the first row
    auto take = seen >= KEYS_AT_ONCE ? take_scores<KEYS_AT_ONCE / W, true> : TAKE_SOME[count / PAIR - 1];
    take(a, scores, seen, rows, factors);
    for (int64_t row = 0; row < PAIR && j > 0; row++) {
      float* sum = sums + row * width;
      for (int64_t d = 0; d < width; d += W) store(sum + d, mul(load(sum + d), set1(rows.before[row])));
    }
    for (int64_t d = 0; d < width; d += PAIR) {
      const uint8_t* tile = values + j * row_bytes + d / SIDE * TILE_BYTES;
      multiply_square(sums + d, width * 4, j == 0, (const uint8_t*)factors, KEYS_AT_ONCE * 2, tile, tile + TILE_BYTES,
                      PAIR * row_bytes, count / PAIR);
    }
  }
  tiles_end();
  int64_t sequence = head / a.heads;
  for (int64_t row = 0; row < tokens; row++) {
    const float* sum = sums + row * width;
    auto* y = (uint16_t*)a.y + ((sequence * a.tokens + begin + row) * a.heads + head % a.heads) * width;
    F factor = set1(1.0f / rows.total[row]);
    for (int64_t d = 0; d < width; d += PAIR) {
      store_pair(y + d, mul(load(sum + d), factor), mul(load(sum + d + W), factor));
    }
  }
}

const ManyTokens tiled_attention = {takes_tiles, arranged_bytes, arrangements, arrange_keys_and_values,
                                    blocks,      attend_block};
