// AMX (Sapphire Rapids and later): many tokens as 16 x 16 tiles; everything else as AVX512 does it.
//
//   C (16 rows of weight, 16 tokens) += A (16 rows, 64 bytes of K) * B (64 bytes of K, 16 tokens, K in fours of bytes)
//
// Weight rows are A as they lie in the panel; tokens are arranged once as B. bfloat16 tokens take every format, with
// the scale folded into a bfloat16 panel; int8 tokens take integer weights with one scale a row.
#include <immintrin.h>

#include "kernels.h"
#include "unroll.h"

namespace zp {
namespace {
#include "avx512.inc.h"
#include "tiles.inc.h"

constexpr int64_t SIDE = 16;  // rows and columns of a tile
constexpr int64_t TILE_BYTES = 1024;
constexpr int64_t PAIR = 2 * SIDE;  // two by two tiles of sums at a time
constexpr int64_t STEPS = 16;       // tiles along K of a pass: 512 bfloat16 or 1024 bytes, first-level cache
constexpr int64_t FEWEST = 16;      // tokens below which AVX512 is faster

enum class Tiles { none, bfloat16, bytes };

Tiles of_many(const Job& j) {
  if (j.int8_activations) return is_integer(j) && j.blocks == 1 ? Tiles::bytes : Tiles::none;
  return j.x_dtype == ZP_BF16 ? Tiles::bfloat16 : Tiles::none;
}

Tiles tiles(const Job& j) { return j.tiled && j.m >= FEWEST ? of_many(j) : Tiles::none; }

int64_t steps(const Job& j, Tiles t) {
  int64_t columns = t == Tiles::bytes ? 64 : 32;
  return (j.format->k + columns - 1) / columns;
}

// prepared: [m / 32][step][2 tiles][16 words of K][16 tokens] words; then for bytes [m] x_scale, [m] x_sum.
void prepare_bfloat16(const Job& j, int64_t unit) {
  int64_t k = j.format->k, count = steps(j, Tiles::bfloat16);
  uint32_t* out = (uint32_t*)(j.prepared + unit * count * 2 * TILE_BYTES);
  uint32_t* x = (uint32_t*)__builtin_alloca(count * 64);
  for (int64_t t = 0; t < PAIR; t++) {
    int64_t m = unit * PAIR + t;
    __builtin_memset(x, 0, count * 64);
    if (m < j.m) __builtin_memcpy(x, x_row(j, m), k * 2);
    for (int64_t w = 0; w < count * SIDE; w++) {
      out[(w / SIDE * 2 + t / SIDE) * (TILE_BYTES / 4) + w % SIDE * SIDE + t % SIDE] = x[w];
    }
  }
}

float* byte_scales(const Job& j) {
  return (float*)(j.prepared + round_up(j.m, PAIR) / PAIR * steps(j, Tiles::bytes) * 2 * TILE_BYTES);
}

void prepare_bytes(const Job& j, int64_t unit) {
  int64_t count = steps(j, Tiles::bytes), padded = count * 64;
  uint32_t* out = (uint32_t*)(j.prepared + unit * count * 2 * TILE_BYTES);
  float* x_scale = byte_scales(j);
  float* x_sum = x_scale + round_up(j.m, PAIR);
  float* x = (float*)__builtin_alloca(padded * 4);
  int16_t* q = (int16_t*)__builtin_alloca(padded * 2);
  uint32_t* words = (uint32_t*)__builtin_alloca(padded);
  for (int64_t t = 0; t < PAIR; t++) {
    int64_t m = unit * PAIR + t;
    x_scale[m] = x_sum[m] = 0;
    __builtin_memset(words, 0, padded);
    if (m < j.m) {
      quantize_token(j, m, x, q, x_scale + m, x_sum + m);
      for (int64_t i = 0; i < padded; i++) ((int8_t*)words)[i] = (int8_t)q[i];
    }
    for (int64_t w = 0; w < count * SIDE; w++) {
      out[(w / SIDE * 2 + t / SIDE) * (TILE_BYTES / 4) + w % SIDE * SIDE + t % SIDE] = words[w];
    }
  }
}

// sums (32 rows, 32 tokens) += panel (32 rows, row_bytes) * x.
template <Tiles KIND>
void multiply_tiles(const uint8_t* panel, int64_t row_bytes, const uint8_t* x, int64_t count, void* sums,
                    int64_t stride) {
  uint8_t* c = (uint8_t*)sums;
  TILE_LOAD(0, c, stride);
  TILE_LOAD(1, c + 64, stride);
  TILE_LOAD(2, c + SIDE * stride, stride);
  TILE_LOAD(3, c + SIDE * stride + 64, stride);
  for (int64_t s = 0; s < count; s++) {
    TILE_LOAD(4, panel + 64 * s, row_bytes);
    TILE_LOAD(6, x + 2 * TILE_BYTES * s, 64);
    TILE_LOAD(7, x + 2 * TILE_BYTES * s + TILE_BYTES, 64);
    TILE_LOAD(5, panel + SIDE * row_bytes + 64 * s, row_bytes);
    if constexpr (KIND == Tiles::bytes) {
      TILE_BYTES_DOT(0, 4, 6);
      TILE_BYTES_DOT(1, 4, 7);
      TILE_BYTES_DOT(2, 5, 6);
      TILE_BYTES_DOT(3, 5, 7);
    } else {
      TILE_BFLOAT16_DOT(0, 4, 6);
      TILE_BFLOAT16_DOT(1, 4, 7);
      TILE_BFLOAT16_DOT(2, 5, 6);
      TILE_BFLOAT16_DOT(3, 5, 7);
    }
  }
  TILE_STORE(0, c, stride);
  TILE_STORE(1, c + 64, stride);
  TILE_STORE(2, c + SIDE * stride, stride);
  TILE_STORE(3, c + SIDE * stride + 64, stride);
}

// scratch: panel (rows, STEPS * 64 bytes), sums (rows, tokens) of float32 or int32.
template <Tiles KIND>
void multiply_amx_rows(const Job& j, int64_t n0, int64_t n1, uint8_t* scratch) {
  constexpr int64_t COLUMNS = KIND == Tiles::bytes ? 64 : 32, ROW = STEPS * 64;
  const zp_format& f = *j.format;
  const zp_weight w = weight_of(j);
  int64_t count = steps(j, KIND), rows = n1 - n0, padded = round_up(rows, PAIR), tokens = round_up(j.m, PAIR);
  uint8_t* panel = scratch;
  float* sums = (float*)(panel + padded * ROW);
  float* line = sums + padded * tokens;
  __builtin_memset(sums, 0, padded * tokens * 4);
  __builtin_memset(panel, 0, padded * ROW);
  tiles_begin();
  for (int64_t s0 = 0; s0 < count; s0 += STEPS) {
    int64_t part = count - s0 < STEPS ? count - s0 : STEPS, k0 = s0 * COLUMNS;
    int64_t columns = f.k - k0 < part * COLUMNS ? f.k - k0 : part * COLUMNS;
    for (int64_t r = 0; r < rows; r++) {
      uint8_t* to = panel + r * ROW;
      if constexpr (KIND == Tiles::bytes) {
        unpack(j.packed + (n0 + r) * j.row_bytes + k0 * f.bits / 8, f.bits, columns, (uint8_t*)line);
        __builtin_memcpy(to, line, columns);
      } else {
        decode_columns(w, n0 + r, k0, k0 + columns, line);
        from_f32(line, ZP_BF16, columns, to);
      }
      int64_t bytes = columns * (KIND == Tiles::bytes ? 1 : 2);
      __builtin_memset(to + bytes, 0, part * 64 - bytes);
    }
    for (int64_t m = 0; m < j.m; m += PAIR) {
      const uint8_t* x = j.prepared + (m / PAIR * count + s0) * 2 * TILE_BYTES;
      for (int64_t r = 0; r < padded; r += PAIR) {
        multiply_tiles<KIND>(panel + r * ROW, ROW, x, part, sums + r * tokens + m, tokens * 4);
      }
    }
  }
  tiles_end();
  if constexpr (KIND == Tiles::bytes) {
    const float* x_scale = byte_scales(j);
    const float* x_sum = x_scale + tokens;
    for (int64_t r = 0; r < rows; r++) {
      F scale = set1(scale_of(w, n0 + r, 0)), offset = set1(offset_of(w, n0 + r, 0));
      for (int64_t m = 0; m < tokens; m += W) {
        float* at = sums + r * tokens + m;
        F whole = _mm512_cvtepi32_ps(_mm512_loadu_si512(at));
        F product = _mm512_fnmadd_ps(offset, load(x_sum + m), mul(whole, load(x_scale + m)));
        store(at, mul(scale, product));
      }
    }
  }
  put_transposed(j, sums, tokens, 0, j.m, n0, rows);
}

// --- the table ---

bool tile_amx(const Job& j) { return is_integer(j) && of_many(j) != Tiles::none ? j.m >= FEWEST : tile512(j); }

int64_t tokens_amx(const Job& j) { return tiles(j) == Tiles::none ? tokens512(j) : PAIR; }

size_t prepared_bytes_amx(const Job& j) {
  Tiles t = tiles(j);
  if (t == Tiles::none) return prepared_bytes512(j);
  int64_t units = round_up(j.m, PAIR) / PAIR;
  return units * steps(j, t) * 2 * TILE_BYTES + (t == Tiles::bytes ? 2 * units * PAIR * 4 : 0);
}

void prepare_amx(const Job& j, int64_t unit) {
  Tiles t = tiles(j);
  if (t == Tiles::none) return prepare512(j, unit);
  return t == Tiles::bytes ? prepare_bytes(j, unit) : prepare_bfloat16(j, unit);
}

int64_t rows_amx(const Job& j, int32_t threads) {
  if (tiles(j) == Tiles::none) return rows(j, threads);
  int64_t share = round_up((j.format->n + 4 * threads - 1) / (4 * threads), PAIR);
  return share > 4 * PAIR ? 4 * PAIR : share;
}

size_t scratch_bytes_amx(const Job& j, int64_t rows) {
  if (tiles(j) == Tiles::none) return scratch_bytes512(j, rows);
  return round_up(rows, PAIR) * (STEPS * 64 + round_up(j.m, PAIR) * 4) + STEPS * 64 * 4;
}

void multiply_amx(const Job& j, int64_t n0, int64_t n1, uint8_t* scratch) {
  Tiles t = tiles(j);
  if (t == Tiles::none) return multiply512(j, n0, n1, scratch);
  if (t == Tiles::bytes) return multiply_amx_rows<Tiles::bytes>(j, n0, n1, scratch);
  multiply_amx_rows<Tiles::bfloat16>(j, n0, n1, scratch);
}

double peak_amx(int32_t what, int64_t repeats) {
  if (what == ZP_PEAK_FLOAT32) return peak512(what, repeats);
  alignas(64) uint8_t zeros[TILE_BYTES] = {};
  tiles_begin();
  TILE_LOAD(0, zeros, 64);
  TILE_LOAD(1, zeros, 64);
  TILE_LOAD(2, zeros, 64);
  TILE_LOAD(3, zeros, 64);
  TILE_LOAD(4, zeros, 64);
  TILE_LOAD(5, zeros, 64);
  for (int64_t i = 0; i < repeats; i++) {
    if (what == ZP_PEAK_BYTES) {
      TILE_BYTES_DOT(0, 4, 5);
      TILE_BYTES_DOT(1, 4, 5);
      TILE_BYTES_DOT(2, 4, 5);
      TILE_BYTES_DOT(3, 4, 5);
    } else {
      TILE_BFLOAT16_DOT(0, 4, 5);
      TILE_BFLOAT16_DOT(1, 4, 5);
      TILE_BFLOAT16_DOT(2, 4, 5);
      TILE_BFLOAT16_DOT(3, 4, 5);
    }
  }
  tiles_end();
  return 2.0 * 4 * SIDE * SIDE * (what == ZP_PEAK_BYTES ? 64 : 32) * (double)repeats;
}

}  // namespace

extern const Isa amx;
const Isa amx = {
    "amx",  tile_amx, tokens_amx, prepared_bytes_amx, prepare_amx, rows_amx, scratch_bytes_amx, multiply_amx, decode,
    encode, read,     peak_amx};

}  // namespace zp
