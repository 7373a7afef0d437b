// AMX (Sapphire Rapids and later): tokens as 16 x 16 tiles; what has no tiles as AVX512 does it.
//
//   C (16 rows of weight, 16 tokens) += A (16 rows, 64 bytes of K) * B (64 bytes of K, 16 tokens, K in fours of bytes)
//
// Weight rows are A as they lie in the panel; tokens are arranged once as B. bfloat16 tokens take every format, with
// the scale of a group folded into a bfloat16 panel. Of float32 and float16 tokens each value is the sum of two
// bfloat16, and so is a weight that does not fit one:
//
//   x * w  =  x0 * w0 + x0 * w1 + x1 * w0,  but for x1 * w1, which is 2^-18 of it and left out
//
// int8 activations are bytes where weights are integers with one scale a row, else bfloat16, which holds them.
#include <immintrin.h>

#include "kernels.h"
#include "unroll.h"

namespace zp {
namespace {
#include "avx512.inc.h"
#include "bfloat16.inc.h"
#include "tiles.inc.h"

constexpr int64_t SIDE = 16;  // rows and columns of a tile
constexpr int64_t TILE_BYTES = 1024;
constexpr int64_t PAIR = 2 * SIDE;     // two by two tiles of sums at a time: a square
constexpr int64_t ROWS = 288;          // of a panel of many tokens, at most, and
constexpr int64_t UNITS_AT_HAND = 16;  // units of 32 tokens whose sums are kept with it in the second-level cache

// What is multiplied: bytes, or bfloat16, so many for a token's value by so many for a weight's.
enum class Tiles { none, bytes, one_by_one, one_by_two, two_by_one, two_by_two };

constexpr int token_parts(Tiles t) { return t == Tiles::two_by_one || t == Tiles::two_by_two ? 2 : 1; }
constexpr int weight_parts(Tiles t) { return t == Tiles::one_by_two || t == Tiles::two_by_two ? 2 : 1; }

// Whether one bfloat16 holds any of its codes, but for the scale of the row.
bool fits_bfloat16(const zp_format& f) {
  if (f.kind == ZP_INTEGER) return scaled_by_row(f) && !f.float_zero_point;
  return f.kind == ZP_BFLOAT16 || (is_float8(f) && scaled_by_row(f));
}

Tiles of_many(const Job& j) {
  bool one = fits_bfloat16(*j.format), rounds = j.x_dtype == ZP_BF16;  // the weight, as torch does
  if (j.int8_activations) {
    if (is_integer(j) && j.blocks == 1) return Tiles::bytes;
    return one || rounds ? Tiles::one_by_one : Tiles::one_by_two;
  }
  if (rounds) return Tiles::one_by_one;
  return one ? Tiles::two_by_one : Tiles::two_by_two;
}

// Fewer tokens of integers and codebooks are multiplied with 8, 15 or 16 bits each, of other formats in float32.
int64_t fewest(const Job& j) {
  const zp_format& f = *j.format;
  auto of_kind = [&](int64_t integers, int64_t codebooks, int64_t floats) {
    return is_integer(j) ? integers : f.kind == ZP_CODEBOOK ? codebooks : floats;
  };
  switch (of_many(j)) {
    case Tiles::one_by_one:
      if (j.int8_activations) return of_kind(11, 8, 4);
      if (is_float8(f)) return scaled_by_row(f) ? 2 : 3;
      return f.kind == ZP_BFLOAT16 ? 1 : f.kind == ZP_FLOAT16 ? 3 : 5;
    case Tiles::one_by_two: return of_kind(24, 12, 6);
    case Tiles::two_by_one: return of_kind(12, 12, 4);
    case Tiles::two_by_two: return of_kind(14, 14, 8);
    default: return 5;  // bytes
  }
}

bool tile_amx(const Job& j) { return j.m >= fewest(j); }

Tiles tiles(const Job& j) { return j.tiled ? of_many(j) : Tiles::none; }

constexpr int64_t columns_of(Tiles t) { return t == Tiles::bytes ? 64 : 32; }  // of a step

constexpr int64_t token_step(Tiles t) { return 2 * TILE_BYTES * token_parts(t); }  // bytes of 32 tokens
constexpr int64_t row_step(Tiles t) { return 64 * weight_parts(t); }               // bytes of a row of the panel

int64_t steps(const Job& j, Tiles t) { return (j.format->k + columns_of(t) - 1) / columns_of(t); }

int64_t units(const Job& j) { return (j.m + PAIR - 1) / PAIR; }

// Few tokens: rows are read from end to end and sums stay in registers; many: a panel of many rows and a stretch of all
// tokens stay in the second-level cache, 32 tokens of it in the first.
bool has_few_tokens(const Job& j) { return units(j) <= 4; }

int64_t pass_steps(const Job& j, Tiles t) {
  int64_t most = has_few_tokens(j) ? 128 : 18 / token_parts(t), count = steps(j, t);
  int64_t passes = (count + most - 1) / most;
  return (count + passes - 1) / passes;
}

// Of a row of a panel: an odd number of lines, which spreads rows over the cache.
int64_t panel_stride(const Job& j, Tiles t) { return (pass_steps(j, t) * weight_parts(t) / 2 * 2 + 1) * 64; }

int64_t panel_rows(const Job& j) { return has_few_tokens(j) ? PAIR : ROWS; }

// Squares of sums that a panel keeps from pass to pass; of a single pass each square is put at once.
int64_t squares_kept(const Job& j, Tiles t, int64_t squares) {
  return pass_steps(j, t) == steps(j, t) ? 1 : squares * (units(j) < UNITS_AT_HAND ? units(j) : UNITS_AT_HAND);
}

// prepared: [pass][unit of 32 tokens][step][part][2 tiles][16 words of K][16 tokens] words; then of int8 activations
// [m] x_scale and [m] x_sum.
uint8_t* arranged(const Job& j, Tiles t, int64_t unit, int64_t step) {
  int64_t pass = pass_steps(j, t), first = step / pass * pass, count = steps(j, t) - first;
  if (count > pass) count = pass;
  return j.prepared + (first * units(j) + unit * count + step - first) * token_step(t);
}

float* token_scales(const Job& j, Tiles t) { return (float*)(j.prepared + units(j) * steps(j, t) * token_step(t)); }

// 32 columns of a token from k on; those not among `columns` are 0.
template <int PARTS>
inline INLINE Words32<PARTS> token_words(const Job& j, int64_t m, int64_t k, __mmask32 columns) {
  const uint8_t* row = x_row(j, m);
  if constexpr (PARTS == 1) return {{_mm512_maskz_loadu_epi16(columns, (const uint16_t*)row + k)}};
  if (j.x_dtype == ZP_F32) {
    const float* x = (const float*)row + k;
    return rounded<PARTS>(_mm512_maskz_loadu_ps((__mmask16)columns, x),
                          _mm512_maskz_loadu_ps((__mmask16)(columns >> 16), x + W));
  }
  __m512i x = _mm512_maskz_loadu_epi16(columns, (const uint16_t*)row + k);
  return rounded<PARTS>(_mm512_cvtph_ps(_mm512_castsi512_si256(x)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1)));
}

template <Tiles KIND>
void prepare_floats(const Job& j, int64_t unit) {
  constexpr int PARTS = token_parts(KIND);
  int64_t k = j.format->k, count = steps(j, KIND), size = j.x_dtype == ZP_F32 ? 4 : 2;
  for (int64_t s = 0; s < count; s++) {
    __mmask32 columns = k - 32 * s >= 32 ? ~0u : (1u << (k - 32 * s)) - 1;
    float* out = (float*)arranged(j, KIND, unit, s);
    for (int64_t half = 0; half < 2; half++) {
      F words[PARTS][SIDE];
      unroll<SIDE>([&](auto t) INLINE {
        int64_t m = unit * PAIR + half * SIDE + t;
        if constexpr (PARTS == 2) {  // one part gains nothing by it
          const uint8_t* soon = x_row(j, m < j.m ? m : 0) + 32 * (s + 2) * size;
          for (int64_t line = 0; line < 32 * size; line += 64) __builtin_prefetch(soon + line);
        }
        auto token = token_words<PARTS>(j, m < j.m ? m : 0, 32 * s, m < j.m ? columns : 0);
        unroll<PARTS>([&](auto p) INLINE { words[p][t] = _mm512_castsi512_ps(token.part[p]); });
      });
      unroll<PARTS>([&](auto p) INLINE {
        transpose(words[p]);
        unroll<SIDE>([&](auto w) INLINE { store(out + ((2 * p + half) * SIDE + w) * SIDE, words[p][w]); });
      });
    }
  }
}

// 16 values of a token from k on; those not among `columns` are 0.
inline INLINE F token_values(const Job& j, const uint8_t* row, int64_t k, __mmask16 columns) {
  if (j.x_dtype == ZP_F32) return _mm512_maskz_loadu_ps(columns, (const float*)row + k);
  __m256i words = _mm256_maskz_loadu_epi16(columns, (const uint16_t*)row + k);
  return j.x_dtype == ZP_BF16 ? from_bf16(words) : _mm512_cvtph_ps(words);
}

__mmask16 columns_from(const Job& j, int64_t k) {
  int64_t left = j.format->k - k;
  return left >= W ? 0xffff : left > 0 ? lanes(left) : 0;
}

// 16 tokens that become integers; of those that are not there, zeros do.
struct Sixteen {
  const uint8_t* row[SIDE];
  __mmask16 there[SIDE];  // all columns or none
  float divisor[SIDE], inverse[SIDE];
};

// Their integers of a step, of values that `ratio`(token, value) has divided, as a tile. -> total, with the sums of
// bytes.
template <Tiles KIND, class Ratio>
inline INLINE __m512i put_int8(const Job& j, const Sixteen& x, int64_t k, Ratio ratio, __m512i total, float* out) {
  F words[SIDE];
  unroll<SIDE>([&](auto t) INLINE {
    auto values = [&](int64_t i) INLINE {
      return ratio(t, token_values(j, x.row[t], k + i * W, columns_from(j, k + i * W) & x.there[t]));
    };
    if constexpr (KIND == Tiles::bytes) {
      auto integers = [&](int64_t i) INLINE { return _mm512_cvtps_epi32(values(i)); };  // to nearest even
      __m512i low = _mm512_packs_epi32(integers(0), integers(1)), high = _mm512_packs_epi32(integers(2), integers(3));
      words[t] = _mm512_castsi512_ps(_mm512_packs_epi16(low, high));  // word 4 * a + b: columns 16 * b + 4 * a on
    } else {
      words[t] = (F)_mm512_cvtne2ps_pbh(round_even(values(1)), round_even(values(0)));
    }
  });
  transpose(words);
  unroll<SIDE>([&](auto w) INLINE {
    store(out + (KIND == Tiles::bytes ? w % 4 * 4 + w / 4 : w) * SIDE, words[w]);
    if constexpr (KIND == Tiles::bytes) {
      total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), _mm512_castps_si512(words[w]));
    }
  });
  return total;
}

// int8 activations, as the bytes or the bfloat16 of a step.
template <Tiles KIND>
void prepare_int8(const Job& j, int64_t unit) {
  int64_t k = j.format->k, count = steps(j, KIND);
  for (int64_t half = 0; half < 2; half++) {
    int64_t first = unit * PAIR + half * SIDE;
    float* x_scale = token_scales(j, KIND) + first;
    Sixteen x;
    bool quotients = true;
    for (int64_t t = 0; t < SIDE; t++) {
      bool there = first + t < j.m;
      x.row[t] = x_row(j, there ? first + t : 0), x.there[t] = there ? 0xffff : 0;
      F top[2] = {zero(), zero()};
      for (int64_t i = 0; i < k; i += 2 * W) {
        unroll<2>([&](auto h) INLINE {
          __mmask16 columns = columns_from(j, i + h * W) & x.there[t];
          top[h] = abs_max(top[h], token_values(j, x.row[t], i + h * W, columns));
        });
      }
      const TokenScale token(largest(abs_max(top[0], top[1])), 127.0f, true);
      x_scale[t] = token.scale, x.divisor[t] = token.divisor(), x.inverse[t] = token.inverse;
      quotients = quotients && token.has_quotient();
    }
    __m512i total = _mm512_setzero_si512();
    for (int64_t s = 0; s < count; s++) {
      float* out = (float*)(arranged(j, KIND, unit, s) + half * TILE_BYTES);
      auto put = [&](auto ratio) INLINE { total = put_int8<KIND>(j, x, s * columns_of(KIND), ratio, total, out); };
      if (quotients) {
        put([&](int64_t t, F v)
                INLINE { return quotient(v, set1(x.divisor[t]), set1(-x.divisor[t]), set1(x.inverse[t])); });
      } else {
        put([&](int64_t t, F v) INLINE { return div(v, set1(x.divisor[t])); });
      }
    }
    store(x_scale + units(j) * PAIR, mul(load(x_scale), _mm512_cvtepi32_ps(total)));
  }
}

constexpr int64_t SQUARE_STRIDE = PAIR * 4;

// Where tile 0, 1, 2 or 3 of sums lies in a square of them: 32 rows of 32 tokens.
inline uint8_t* quarter(float* square, int64_t tile) {
  return (uint8_t*)square + tile / 2 * SIDE * SQUARE_STRIDE + tile % 2 * 64;
}

inline INLINE void store_sums(float* square) {
  unroll<4>([&](auto i) INLINE { tile_store<i>(quarter(square, i), SQUARE_STRIDE); });
}

// The square's sums, or those of the first pass, zeros, += rows (32, row_step bytes a step) * x, in tiles, where they
// stay. Those of the square before, if any, are stored one by one as their tiles are wanted, so that products go on
// meanwhile. MANY: more than 16 tokens. Of `next`, `lines` of 64 bytes are fetched in each step, and the sums behind
// these.
template <Tiles KIND, bool MANY>
__attribute__((noinline)) void multiply_tiles(const uint8_t* rows, int64_t row_bytes, const uint8_t* x, int64_t count,
                                              bool first, float* square, float* before, const uint8_t* next,
                                              int64_t lines) {
  const uint8_t* ahead = (const uint8_t*)(square + PAIR * PAIR);
  auto dot = [](auto c) INLINE {
    constexpr int A = 4 + c / 2, B = 6 + c % 2;
    if constexpr (!MANY && c % 2 == 1) return;
    if constexpr (KIND == Tiles::bytes) {
      tile_bytes<c, A, B>();
    } else {
      tile_bfloat16<c, A, B>();
    }
  };
  auto turn = [&](auto c) INLINE {
    if (before) tile_store<c>(quarter(before, c), SQUARE_STRIDE);
    if constexpr (!MANY && c % 2 == 1) return;
    first ? tile_zero<c>() : tile_load<c>(quarter(square, c), SQUARE_STRIDE);
    dot(c);
  };
  auto step = [&](auto turn_or_dot) INLINE {
    constexpr int64_t LAST = row_step(KIND) - 64, AHEAD = token_parts(KIND) == 2 ? 7 : 3;
    for (int64_t i = 0; i < lines; i++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
    if (!first) unroll<AHEAD>([&](auto) INLINE { __builtin_prefetch(ahead, 1), ahead += 64; });
    tile_load<6>(x, 64);  // all loads first: where they and products take turns, the fewer turns the better
    tile_load_once<4>(rows + LAST, row_bytes);
    if constexpr (MANY) tile_load<7>(x + TILE_BYTES, 64);
    tile_load_once<5>(rows + SIDE * row_bytes + LAST, row_bytes);
    unroll<4>(turn_or_dot);
    if constexpr (LAST != 0) {  // the first part of the weights
      tile_load_once<4>(rows, row_bytes);
      tile_load_once<5>(rows + SIDE * row_bytes, row_bytes);
      unroll<4>(dot);
    }
    if constexpr (token_parts(KIND) == 2) {  // the second part of the tokens
      tile_load<6>(x + 2 * TILE_BYTES, 64);
      if constexpr (MANY) tile_load<7>(x + 3 * TILE_BYTES, 64);
      unroll<4>(dot);
    }
    rows += row_step(KIND), x += token_step(KIND);
  };
  step(turn);
  for (int64_t s = 1; s < count; s++) step(dot);
}

// What outputs of rows [n0, n1), a panel, need once their sums are complete, filled up to whole squares.
struct Epilogue {
  int64_t n0, n1;
  alignas(64) float scale[ROWS], offset[ROWS], bias[ROWS];

  Epilogue(const Job& j, Tiles t, int64_t begin, int64_t end) : n0(begin), n1(end) {
    const zp_weight w = weight_of(j);
    bool scaled = t != Tiles::bytes && !scaled_by_row(*j.format);  // weights of the panel had their scales
    for (int64_t i = 0; i < round_up(n1 - n0, PAIR); i++) {
      bool there = n0 + i < n1;
      scale[i] = there && !scaled ? scale_of(w, n0 + i, 0) : 1;
      offset[i] = there && t == Tiles::bytes ? offset_of(w, n0 + i, 0) : 0;
      bias[i] = there && j.bias ? read_float(j.bias, n0 + i, j.bias_dtype) : 0;
    }
  }
};

// 16 tokens' outputs of a row of the panel, but for its bias.
template <Tiles KIND>
inline INLINE F outputs(const Epilogue& e, int64_t row, const float* sums, F x_scale, F x_sum) {
  F v = load(sums);
  if constexpr (KIND == Tiles::bytes) {
    F whole = mul(_mm512_cvtepi32_ps((__m512i)v), x_scale);
    v = _mm512_fnmadd_ps(set1(e.offset[row]), x_sum, whole);
  } else {
    v = mul(v, x_scale);
  }
  return mul(set1(e.scale[row]), v);
}

// A square of sums, of tokens from m and rows of the panel from `row` on, -> y.
template <Tiles KIND>
void put_square(const Job& j, const Epilogue& e, float* sums, int64_t m, int64_t row) {
  // Words of rows 2 * i and 2 * i + 1 side by side, so that 32 rows are turned as 16 are.
  const __m512i pairs =
      _mm512_setr_epi32(0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, 0x180008,
                        0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
  int64_t n = e.n0 + row, rows = e.n1 - n < PAIR ? e.n1 - n : PAIR;
  for (int64_t half = 0; half < PAIR && m + half < j.m; half += SIDE) {
    int64_t tokens = j.m - m - half < SIDE ? j.m - m - half : SIDE;
    F x_scale = set1(1), x_sum = zero(), square[SIDE];
    if (j.int8_activations) {
      const float* scales = token_scales(j, KIND) + m + half;
      x_scale = load(scales), x_sum = load(scales + units(j) * PAIR);
    }
    auto of_row = [&](int64_t r) INLINE { return outputs<KIND>(e, row + r, sums + r * PAIR + half, x_scale, x_sum); };
    if (rows < PAIR) {
      for (int64_t r = 0; r < rows; r++) store(sums + r * PAIR + half, of_row(r));
      put_transposed(j, sums + half, PAIR, m + half, tokens, n, rows);
      continue;
    }
    auto biased = [&](int64_t r) INLINE { return add(of_row(r), set1(e.bias[row + r])); };
    int64_t first = (m + half) * j.format->n + n;  // of the outputs
    if (j.x_dtype == ZP_BF16) {
      unroll<SIDE>([&](auto i) INLINE {
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh(biased(2 * i + 1), biased(2 * i));
        square[i] = (F)_mm512_permutexvar_epi16(pairs, both);
      });
      transpose(square);
      for (int64_t t = 0; t < tokens; t++) store((float*)((uint16_t*)j.y + first + t * j.format->n), square[t]);
      continue;
    }
    for (int64_t r = 0; r < PAIR; r += SIDE) {
      unroll<SIDE>([&](auto i) INLINE { square[i] = biased(r + i); });
      transpose(square);
      for (int64_t t = 0; t < tokens; t++) {
        int64_t at = first + t * j.format->n + r;
        j.x_dtype == ZP_F32 ? store((float*)j.y + at, square[t]) : store_f16((uint16_t*)j.y + at, square[t]);
      }
    }
  }
}

// Few tokens use rows once, and so read those that lie as tiles straight from the weight. For many they
// are copied: tiles load faster from a panel, whose rows are spread over the cache, than a copy costs.
template <Tiles KIND>
bool as_they_lie(const Job& j) {
  const zp_format& f = *j.format;
  bool same = KIND == Tiles::bytes ? f.bits == 8 && f.k % 64 == 0 : f.kind == ZP_BFLOAT16 && f.k % 32 == 0;
  return same && has_few_tokens(j);
}

// Columns [k0, k1) of a row as tiles take them. What lies ahead is fetched meanwhile.
template <Tiles KIND>
inline INLINE void unpack_row(const Job& j, int64_t row, int64_t k0, int64_t k1, Ahead ahead, uint8_t* out) {
  const zp_format& f = *j.format;
  for (int64_t k = k0; k < k1; k += MOST, out += MOST / columns_of(KIND) * row_step(KIND)) {
    int64_t end = k + MOST < k1 ? k + MOST : k1, bytes = (end - k) * f.bits / 8;
    const uint8_t* packed = j.packed + row * j.row_bytes + k * f.bits / 8;
    for (int64_t i = 0; i < bytes && !fetched_by_lines(f); i += 64) fetch<64>(packed + i, ahead);
    if constexpr (KIND == Tiles::bytes) {
      unpack(packed, f.bits, end - k, out);
    } else {
      decode_bfloat16<weight_parts(KIND)>(weight_of(j), row, k, end, !scaled_by_row(f), (uint16_t*)out, ahead);
    }
  }
}

// Rows [n0, n1), at most panel_rows, times tokens from unit u0 up to u1. scratch: the panel, sums [unit][rows / 32] of
// squares, or of one.
template <Tiles KIND>
void multiply_panel(const Job& j, int64_t n0, int64_t n1, int64_t u0, int64_t u1, uint8_t* scratch) {
  const zp_format& f = *j.format;
  bool lie = as_they_lie<KIND>(j) && (n1 - n0) % PAIR == 0;
  int64_t count = steps(j, KIND), pass = pass_steps(j, KIND), rows = n1 - n0, squares = (rows + PAIR - 1) / PAIR;
  int64_t stride = panel_stride(j, KIND), row_bytes = lie ? j.row_bytes : stride;
  float* sums = (float*)(scratch + squares * PAIR * stride);
  const Epilogue epilogue(j, KIND, n0, n1);
  Ahead ahead;
  if (pass < count) ahead.far = ahead.near = 4 * j.row_bytes;               // the same columns of a later row
  int64_t lines = has_few_tokens(j) ? 0 : token_step(KIND) / 64 / squares;  // of the next unit, fetched in a step
  struct {
    float* sums;
    bool complete;
    int64_t m, row;
  } before = {};  // whose sums are in tiles
  auto put_before = [&]() {
    if (before.complete) put_square<KIND>(j, epilogue, before.sums, before.m, before.row);
  };
  auto finish = [&]() {
    if (before.sums) store_sums(before.sums);
    put_before();
    before = {};
  };
  for (int64_t s0 = 0; s0 < count; s0 += pass) {
    int64_t part = count - s0 < pass ? count - s0 : pass, k0 = s0 * columns_of(KIND);
    int64_t k1 = f.k < k0 + part * columns_of(KIND) ? f.k : k0 + part * columns_of(KIND);
    for (int64_t r = 0; !lie && r < rows; r++) {
      unpack_row<KIND>(j, n0 + r, k0, k1, ahead, scratch + r * row_bytes);
    }
    const uint8_t* panel = lie ? j.packed + n0 * j.row_bytes + s0 * row_step(KIND) : scratch;
    for (int64_t u = u0; u < u1; u++) {
      const uint8_t* x = arranged(j, KIND, u, s0);
      for (int64_t i = 0; i < squares; i++) {
        float* square = sums + (pass < count ? (u - u0) * squares + i : 0) * PAIR * PAIR;
        const uint8_t* a = panel + i * PAIR * row_bytes;
        const uint8_t* next = x + part * token_step(KIND) + i * part * lines * 64;
        if (j.m - u * PAIR > SIDE) {
          multiply_tiles<KIND, true>(a, row_bytes, x, part, s0 == 0, square, before.sums, next, lines);
        } else {
          multiply_tiles<KIND, false>(a, row_bytes, x, part, s0 == 0, square, before.sums, next, lines);
        }
        put_before();
        before = {square, s0 + part == count, u * PAIR, i * PAIR};
        if (before.complete && pass < count) finish();  // 1 % faster; of a single pass the other way is
      }
    }
  }
  finish();
}

template <Tiles KIND>
void multiply_tiled(const Job& j, int64_t n0, int64_t n1, uint8_t* scratch) {
  int64_t all = units(j), rows = panel_rows(j);
  tiles_begin();
  for (int64_t n = n0; n < n1; n += rows) {
    for (int64_t u = 0; u < all; u += UNITS_AT_HAND) {
      multiply_panel<KIND>(j, n, n + rows < n1 ? n + rows : n1, u, u + UNITS_AT_HAND < all ? u + UNITS_AT_HAND : all,
                           scratch);
    }
  }
  tiles_end();
}

#include "tiled_attention.inc.h"

// --- the table ---

int64_t tokens_amx(const Job& j) { return tiles(j) == Tiles::none ? tokens_vector(j) : PAIR; }

size_t prepared_bytes_amx(const Job& j) {
  Tiles t = tiles(j);
  if (t == Tiles::none) return prepared_bytes_vector(j);
  return units(j) * steps(j, t) * token_step(t) + (j.int8_activations ? 2 * units(j) * PAIR * 4 : 0);
}

void prepare_amx(const Job& j, int64_t unit) {
  switch (tiles(j)) {
    case Tiles::none: return prepare_vector(j, unit);
    case Tiles::bytes: return prepare_int8<Tiles::bytes>(j, unit);
    case Tiles::one_by_one:
      if (j.int8_activations) return prepare_int8<Tiles::one_by_one>(j, unit);
      return prepare_floats<Tiles::one_by_one>(j, unit);
    case Tiles::one_by_two: return prepare_int8<Tiles::one_by_two>(j, unit);
    case Tiles::two_by_one: return prepare_floats<Tiles::two_by_one>(j, unit);
    case Tiles::two_by_two: return prepare_floats<Tiles::two_by_two>(j, unit);
  }
}

int64_t rows_amx(const Job& j, int32_t threads) {
  if (tiles(j) == Tiles::none) return rows(j, threads);
  int64_t parts = has_few_tokens(j) ? 4 * threads : threads;  // for each panel many tokens are read anew
  int64_t share = (j.format->n + parts - 1) / parts, panels = (share + ROWS - 1) / ROWS;
  return round_up((share + panels - 1) / panels, PAIR);
}

size_t scratch_bytes_amx(const Job& j, int64_t rows) {
  Tiles t = tiles(j);
  if (t == Tiles::none) return scratch_bytes_vector(j, rows);
  int64_t squares = ((rows < panel_rows(j) ? rows : panel_rows(j)) + PAIR - 1) / PAIR;
  return squares * PAIR * panel_stride(j, t) + squares_kept(j, t, squares) * PAIR * PAIR * 4;
}

void multiply_amx(const Job& j, int64_t n0, int64_t n1, uint8_t* scratch) {
  switch (tiles(j)) {
    case Tiles::none: return multiply_vector(j, n0, n1, scratch);
    case Tiles::bytes: return multiply_tiled<Tiles::bytes>(j, n0, n1, scratch);
    case Tiles::one_by_one: return multiply_tiled<Tiles::one_by_one>(j, n0, n1, scratch);
    case Tiles::one_by_two: return multiply_tiled<Tiles::one_by_two>(j, n0, n1, scratch);
    case Tiles::two_by_one: return multiply_tiled<Tiles::two_by_one>(j, n0, n1, scratch);
    case Tiles::two_by_two: return multiply_tiled<Tiles::two_by_two>(j, n0, n1, scratch);
  }
}

// Four products and the four tiles that they need, of numbers in the first-level cache: zeros take a fifth less time.
double peak_amx(int32_t what, int64_t repeats) {
  if (what == ZP_PEAK_FLOAT32) return peak512(what, repeats);
  alignas(64) uint16_t numbers[4 * TILE_BYTES / 2];  // as bfloat16 0.5 to 2
  for (int64_t i = 0; i < 4 * TILE_BYTES / 2; i++) numbers[i] = (uint16_t)(0x3f00 + i % 256);
  tiles_begin();
  unroll<4>([](auto c) INLINE { tile_zero<c>(); });
  for (int64_t i = 0; i < repeats; i++) {
    unroll<4>([&](auto t) INLINE { tile_load<4 + t>((const uint8_t*)numbers + t * TILE_BYTES, 64); });
    unroll<4>([&](auto c) INLINE {
      constexpr int A = 4 + c / 2, B = 6 + c % 2;
      what == ZP_PEAK_BYTES ? tile_bytes<c, A, B>() : tile_bfloat16<c, A, B>();
    });
  }
  tiles_end();
  return 2.0 * 4 * SIDE * SIDE * (what == ZP_PEAK_BYTES ? 64 : 32) * (double)repeats;
}

}  // namespace

extern const Isa amx;
const Isa amx = {"amx",       tile_amx, tokens_amx,        prepared_bytes_amx,
                 prepare_amx, rows_amx, scratch_bytes_amx, multiply_amx,
                 decode,      encode,   normalize,         gate,
                 rotate,      attend,   &tiled_attention,  read,
                 peak_amx};

}  // namespace zp
