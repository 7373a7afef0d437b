// What an instruction set implements, and the jobs it is given. See docs/kernels.md for the picture.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "zeropoint.h"

namespace zp {

// Token rows of x, made ready for one kernel. For integer weights the float activations of a block of `block` columns
// become integers q with x = x_scale * q (16-bit, or 8-bit when the scheme says so), so that
//
//   y[n] = sum over blocks of  scale * x_scale * (sum of stored codes * q  -  (2^(bits-1) + zero_point) * sum of q)
//
// is integer arithmetic inside a block. So are few tokens of a codebook, whose q have 15 bits and whose levels become
// integers too. Other formats keep x as float32.
struct Job {
  const zp_format* format;
  const uint8_t* packed;
  const void* scale;
  const void* zero_point;
  const void* levels;
  const void* bias;
  int32_t bias_dtype;
  const void* x;
  int32_t x_dtype;
  int64_t x_stride;
  int64_t m;
  void* y;
  bool int8_activations;

  bool tiled;         // gemm (true) or dot (false)
  int64_t row_bytes;  // bytes of a packed row
  int64_t block;      // columns that share an activation scale: divides the group, or is >= k
  int64_t blocks;     // ceil(k / block)
  uint8_t* prepared;  // isa->prepared_bytes(job): what isa->prepare wrote
};

// Attention of many tokens, whose keys and values are arranged once.
struct ManyTokens {
  bool (*takes)(const zp_attention&);
  int64_t (*arranged_bytes)(const zp_attention&);
  int64_t (*arrangements)(const zp_attention&);  // calls of arrange
  void (*arrange)(const zp_attention&, int64_t unit, uint8_t* arranged);
  int64_t (*blocks)(const zp_attention&);  // calls of attend
  void (*attend)(const zp_attention&, int64_t block, const uint8_t* arranged);
};

// One instruction set. Every function is single-threaded; the driver splits the work.
struct Isa {
  const char* name;
  bool (*tile)(const Job&);       // gemm is the faster for this job
  int64_t (*tokens)(const Job&);  // prepare() works on this many at a time
  size_t (*prepared_bytes)(const Job&);
  void (*prepare)(const Job&, int64_t unit);     // tokens [unit, unit + 1) * tokens(job)
  int64_t (*rows)(const Job&, int32_t threads);  // weight rows worth one call of multiply
  size_t (*scratch_bytes)(const Job&, int64_t rows);
  void (*multiply)(const Job&, int64_t n0, int64_t n1, uint8_t* scratch);   // all tokens, weight rows [n0, n1)
  void (*decode)(const zp_weight&, int64_t row, int32_t dtype, void* out);  // one dequantized row
  int (*encode)(const zp_format&, const void* weight, int32_t dtype, int64_t row, uint8_t* packed, void* scale,
                int8_t* zero_point);  // one row quantized
  void (*normalize)(const zp_norm&, int64_t row0, int64_t row1);
  void (*gate)(const zp_gate&, int64_t begin, int64_t end);
  void (*rotate)(const zp_rotation&, int64_t begin, int64_t end);  // tokens of all sequences
  // Few tokens, times kv_heads of all sequences; and many. Null where torch's attention is the faster.
  void (*attend)(const zp_attention&, int64_t begin, int64_t end);
  const ManyTokens* many_tokens;
  int64_t (*read)(const uint8_t* data, int64_t bytes);  // the sum of its words, so that it must be read
  double (*peak)(int32_t what, int64_t repeats);        // operations on numbers at hand: what no kernel can exceed
};

enum { ZP_PEAK_FLOAT32, ZP_PEAK_BYTES, ZP_PEAK_BFLOAT16 };  // multiply-adds count as two operations

extern const Isa scalar, avx2, avx_vnni, avx512, avx512_bf16, amx;

}  // namespace zp
