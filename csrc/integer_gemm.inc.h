// Gemm for integer weights: body.inc.h's picture, with codes and activations as integers and one sum of products a
// block. Included after float8.inc.h by an instruction set that also defines
//
//   Ints, set1_ints, load_ints, to_floats   W int32
//   Code               an unsigned integer that a stored code fits; 32 bits hold STEP of them
//   PLANES<P>          words that STEP columns of 8-bit (P = 1) or 16-bit (P = 2) activations take
//   split_columns<P>   32 activations -> their words: PLANES of the first STEP columns, of the next ...
//   dot_codes          acc + the products of STEP codes and STEP columns, in each lane
//   high_and_low       the sums of q = 256 * high + low from those of its planes
//   INT_N, INT_V       rows of weight x vectors of words whose sums stay in registers
//
//   prepared: blocks of TOKENS tokens: [depth / STEP][planes][TOKENS] words, then [blocks][TOKENS] x_scale and x_sum
//   panel:    [rows][depth] stored codes; depth = k rounded up to the activations' block

static constexpr int64_t STEP = 4 / sizeof(Code);

template <int P>
static constexpr int64_t TOKENS = INT_V * W / PLANES<P>;

static inline bool is_integer_gemm(const Job& j) { return j.tiled && is_integer(j); }

static inline int64_t gemm_depth(const Job& j) { return round_up(j.format->k, j.block < 128 ? j.block : 128); }

template <int P>
static inline size_t unit_bytes(const Job& j) {
  return round_up(gemm_depth(j) / STEP * PLANES<P> * TOKENS<P> * 4 + 2 * j.blocks * TOKENS<P> * 4, 64);
}

template <int P>
static void prepare_unit(const Job& j, int64_t unit) {
  constexpr int64_t T = TOKENS<P>;
  int64_t depth = gemm_depth(j), padded = round_up(depth, 64), filled = round_up(j.format->k, 64);
  uint8_t* out = j.prepared + unit * unit_bytes<P>(j);
  float* x_scale = (float*)out + depth / STEP * PLANES<P> * T;
  float* x_sum = x_scale + j.blocks * T;
  float* x = (float*)__builtin_alloca(padded * 4 + 64);
  int16_t* q = (int16_t*)__builtin_alloca(padded * 2 + 64);
  float* one_scale = (float*)__builtin_alloca(j.blocks * 8);
  float* one_sum = one_scale + j.blocks;
  for (int64_t i = filled; i < padded; i++) q[i] = 0;
  for (int64_t t = 0; t < T; t++) {
    int64_t m = unit * T + t;
    if (m < j.m) {
      quantize_token(j, m, x, q, one_scale, one_sum);
    } else {
      for (int64_t i = 0; i < padded; i++) q[i] = 0;
      for (int64_t b = 0; b < 2 * j.blocks; b++) one_scale[b] = 0;
    }
    for (int64_t b = 0; b < j.blocks; b++) x_scale[b * T + t] = one_scale[b], x_sum[b * T + t] = one_sum[b];
    constexpr int64_t COUNT = 32 / STEP * PLANES<P>;
    uint32_t* to = (uint32_t*)out + t;
    for (int64_t k = 0; k < depth; k += 32, to += COUNT * T) {
      uint32_t words[COUNT];
      split_columns<P>(q + k, words);
      for (int64_t i = 0; i < COUNT; i++) to[i * T] = words[i];
    }
  }
}

// NR rows times NV vectors of words, all blocks of [k0, k1); sums (NR, TOKENS) are added to. The factors of a block lie
// together: scale and minus_offset at [blocks][rows], x_scale and x_sum at [blocks][TOKENS].
template <int NR, int P, int NV>
static inline void integer_tile(const Code* panel, int64_t depth, const uint32_t* x, int64_t k0, int64_t k1,
                                int64_t block, const float* x_scale, const float* x_sum, const float* scale,
                                const float* minus_offset, int64_t rows, float* sums) {
  constexpr int64_t T = TOKENS<P>;
  constexpr int TV = NV / PLANES<P>;        // vectors of tokens
  constexpr int64_t WORDS = PLANES<P> * T;  // of a step
  int64_t first = k0 / block;
  x += k0 / STEP * WORDS;
  x_scale += first * T, x_sum += first * T, scale += first * rows, minus_offset += first * rows;
  for (int64_t k = k0; k < k1;) {
    int64_t end = block < k1 - k ? k + block : k1;
    Ints acc[NR][NV];
    unroll<NR>([&](auto i) INLINE { unroll<NV>([&](auto v) INLINE { acc[i][v] = set1_ints(0); }); });
    for (; k < end; k += STEP, x += WORDS) {
      Ints b[NV];
      unroll<NV>([&](auto v) INLINE { b[v] = load_ints(x + v / TV * T + v % TV * W); });
      unroll<NR>([&](auto i) INLINE {
        int32_t some;
        __builtin_memcpy(&some, panel + i * depth + k, 4);
        Ints a = set1_ints(some);
        unroll<NV>([&](auto v) INLINE { acc[i][v] = dot_codes(acc[i][v], a, b[v]); });
      });
    }
    unroll<TV>([&](auto v) INLINE {
      F xs = load(x_scale + v * W), total = load(x_sum + v * W);
      unroll<NR>([&](auto i) INLINE {
        Ints whole = acc[i][v];
        if constexpr (PLANES<P> == 2) whole = high_and_low(whole, acc[i][v + TV]);
        F product = fma(set1(minus_offset[i]), total, mul(to_floats(whole), xs));
        float* to = sums + i * T + v * W;
        store(to, fma(set1(scale[i]), product, load(to)));
      });
    });
    x_scale += T, x_sum += T, scale += rows, minus_offset += rows;
  }
}

static constexpr int64_t STRETCH = 1024;  // columns of tokens kept in the first-level cache while all rows pass

template <int P, int NV>
static void integer_block(const Job& j, const Code* panel, int64_t rows, const uint32_t* x, const float* scale,
                          const float* minus_offset, float* sums) {
  constexpr int64_t T = TOKENS<P>;
  int64_t depth = gemm_depth(j);
  const float* x_scale = (const float*)x + depth / STEP * PLANES<P> * T;
  const float* x_sum = x_scale + j.blocks * T;
  int64_t stretch = j.block > STRETCH ? depth : STRETCH;
  for (int64_t k0 = 0; k0 < depth; k0 += stretch) {
    int64_t k1 = k0 + stretch < depth ? k0 + stretch : depth;
    int64_t i = 0;
    for (; i + INT_N <= rows; i += INT_N) {
      integer_tile<INT_N, P, NV>(panel + i * depth, depth, x, k0, k1, j.block, x_scale, x_sum, scale + i,
                                 minus_offset + i, rows, sums + i * T);
    }
    for (; i < rows; i++) {
      integer_tile<1, P, NV>(panel + i * depth, depth, x, k0, k1, j.block, x_scale, x_sum, scale + i, minus_offset + i,
                             rows, sums + i * T);
    }
  }
}

template <int P>
static void integer_rows(const Job& j, int64_t n0, int64_t n1, uint8_t* scratch) {
  constexpr int64_t T = TOKENS<P>;
  const zp_format& f = *j.format;
  const Blocks blocks(j);
  const F half = set1((float)(1 << (f.bits - 1)));
  int64_t rows = n1 - n0, depth = gemm_depth(j);
  Code* panel = (Code*)scratch;
  float* scale = (float*)(scratch + round_up(rows * depth * sizeof(Code) + 64, 64));
  float* minus_offset = scale + rows * j.blocks;
  float* sums = minus_offset + rows * j.blocks;
  uint8_t* line = (uint8_t*)__builtin_alloca(round_up(depth, 64) + 64);
  for (int64_t r = 0; r < rows; r++) {
    Code* to = panel + r * depth;
    uint8_t* bytes = sizeof(Code) == 1 ? (uint8_t*)to : line;
    unpack(j.packed + (n0 + r) * j.row_bytes, f.bits, f.k, bytes);
    __builtin_memset(bytes + f.k, 0, depth - f.k);
    for (int64_t k = 0; sizeof(Code) > 1 && k < depth; k++) to[k] = bytes[k];
    for (int64_t b = 0; b < j.blocks; b += W) {
      float factors[2][W];
      store(factors[0], blocks.scales(n0 + r, b));
      store(factors[1], sub(zero(), add(blocks.zero_points(n0 + r, b), half)));
      for (int64_t i = 0; i < W && b + i < j.blocks; i++) {
        scale[(b + i) * rows + r] = factors[0][i], minus_offset[(b + i) * rows + r] = factors[1][i];
      }
    }
  }
  for (int64_t m = 0; m < j.m; m += T) {
    const uint32_t* x = (const uint32_t*)(j.prepared + m / T * unit_bytes<P>(j));
    int64_t tokens = j.m - m < T ? j.m - m : T;
    for (int64_t i = 0; i < rows * T; i++) sums[i] = 0;
    constexpr int HALF = INT_V / 2 < PLANES<P> ? INT_V : INT_V / 2;  // but at least a vector of tokens
    if (tokens <= T / 2) {
      integer_block<P, HALF>(j, panel, rows, x, scale, minus_offset, sums);
    } else {
      integer_block<P, INT_V>(j, panel, rows, x, scale, minus_offset, sums);
    }
    put_transposed(j, sums, T, m, tokens, n0, rows);
  }
}

static int64_t integer_tokens(const Job& j) { return j.int8_activations ? TOKENS<1> : TOKENS<2>; }

static size_t integer_prepared_bytes(const Job& j) {
  size_t unit = j.int8_activations ? unit_bytes<1>(j) : unit_bytes<2>(j);
  return (j.m + integer_tokens(j) - 1) / integer_tokens(j) * unit;
}

static void prepare_integer(const Job& j, int64_t unit) {
  j.int8_activations ? prepare_unit<1>(j, unit) : prepare_unit<2>(j, unit);
}

static size_t integer_scratch_bytes(const Job& j, int64_t rows) {
  return rows * (gemm_depth(j) * sizeof(Code) + 8 * j.blocks + 4 * TOKENS<1>)+256;
}

static void multiply_integer(const Job& j, int64_t n0, int64_t n1, uint8_t* scratch) {
  j.int8_activations ? integer_rows<1>(j, n0, n1, scratch) : integer_rows<2>(j, n0, n1, scratch);
}

// --- the functions of kernels.h's table, of an instruction set that has float8.inc.h and this ---

static int64_t tokens_vector(const Job& j) { return is_integer_gemm(j) ? integer_tokens(j) : tokens(j); }

static int64_t rows_vector(const Job& j, int32_t threads) {
  return rows_in_tiles(j, threads, is_integer_gemm(j) ? INT_N : TILE_N);
}

static size_t prepared_bytes_vector(const Job& j) {
  if (is_integer_gemm(j)) return integer_prepared_bytes(j);
  return is_few_float8(j) ? few_float8_prepared_bytes(j) : prepared_bytes(j);
}

static void prepare_vector(const Job& j, int64_t unit) {
  if (is_integer_gemm(j)) return prepare_integer(j, unit);
  if (is_few_float8(j)) return prepare_few_float8(j, unit);
  prepare(j, unit);
}

static size_t scratch_bytes_vector(const Job& j, int64_t rows) {
  if (is_integer_gemm(j)) return integer_scratch_bytes(j, rows);
  return is_few_float8(j) ? 0 : scratch_bytes(j, rows);
}

static void multiply_vector(const Job& j, int64_t n0, int64_t n1, uint8_t* scratch) {
  if (is_integer_gemm(j)) return multiply_integer(j, n0, n1, scratch);
  if (is_few_float8(j)) return dot_float8_rows(j, n0, n1);
  multiply(j, n0, n1, scratch);
}
