// The C ABI of zeropoint's native kernels: plain pointers and sizes, no torch, no Python, no OpenMP.
//
// A weight is N rows of K codes in the layout of the checkpoint: row after row, low bits first, each row starting on a
// byte, integer codes stored unsigned (code + 2^(bits-1)). The kernels read that layout directly; nothing is repacked.
//
//   integer   real = scale * (code - zero_point)
//   codebook  real = scale * levels[code]        levels of the format, or of each row
//   float8    real = scale * code
//   downcast  real = code
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ZP_API __attribute__((visibility("default")))
#define ZP_VERSION 8

enum { ZP_INTEGER, ZP_CODEBOOK, ZP_FLOAT8_E4M3FN, ZP_FLOAT8_E5M2, ZP_BFLOAT16, ZP_FLOAT16 };  // zp_format.kind
enum { ZP_F32, ZP_BF16, ZP_F16, ZP_DOUBLE_QUANT, ZP_E8M0 };                                   // dtypes of floats
enum { ZP_OK = 0, ZP_BAD_INDEX = 1, ZP_NO_MEMORY = 2, ZP_BAD_ARGUMENT = 3 };                  // return codes

// How a weight is stored. With scale_dtype ZP_DOUBLE_QUANT, scales are 8-bit themselves: a float32 offset, then for
// every 256 scales their float32 absmax and 256 codes; scale = offset + absmax * scale_levels[code]. With ZP_E8M0 a
// scale is 2^(byte - 127), 255 being NaN.
typedef struct {
  int32_t kind, bits;
  int64_t n, k;
  int64_t group_size;    // codes of a row that share a scale; k when a row or the whole weight shares one
  int64_t scale_stride;  // scales from one row to the next; 0 when the whole weight shares one
  int32_t scale_dtype;
  int32_t float_zero_point;   // zero points are float16, not int8
  float levels[16];           // codebook only, where rows have none of their own
  const float* scale_levels;  // 256, for ZP_DOUBLE_QUANT only
} zp_format;

// packed: n rows; scale: (n or 1, k / group_size), null for a downcast; zero_point: the same shape, int8 or
// float16, null when symmetric. levels: (n or 1, 16) float16, null where they are the format's.
typedef struct {
  const zp_format* format;
  const uint8_t* packed;
  const void* scale;
  const void* zero_point;
  const void* levels;
} zp_weight;

// x: (m, k) of x_dtype, x_stride elements from row to row, a row contiguous. y: (m, n) of x_dtype, contiguous.
// bias: (n,) of bias_dtype, or null. int8_activations: x is rounded to int8, one scale for each of the m rows, before
// it is multiplied.
typedef struct {
  zp_weight weight;
  const void* bias;
  const void* x;
  void* y;
  int64_t x_stride, m;
  int32_t bias_dtype, x_dtype, int8_activations, threads;
} zp_product;

// y = x @ weight.T + bias. One argument: converting each of fourteen takes ctypes longer than a small product.
ZP_API int zp_linear(const zp_product* product);

// Rows of the weight. indices: (count,), or null for the rows 0 .. count - 1. out: (count, k) of out_dtype, contiguous.
// ZP_BAD_INDEX when an index is outside 0 .. n - 1; nothing is read for it.
ZP_API int zp_rows(const zp_format* format, const void* packed, const void* scale, const void* zero_point,
                   const void* levels, const int64_t* indices, int64_t count, void* out, int32_t out_dtype,
                   int32_t threads);

// Round to nearest, scales chosen and stored as zeropoint.numerics does; levels are the format's. weight: (n, k) of
// dtype, contiguous. Zero points are int8. Returns ZP_BAD_ARGUMENT for a weight that is not finite or a scale that its
// dtype cannot hold.
ZP_API int zp_quantize(const zp_format* format, const void* weight, int32_t dtype, void* packed, void* scale,
                       void* zero_point, int32_t threads);

// y = x / sqrt(mean of x^2 of a row + eps) * (weight + shift), in float32. x, y: (rows, columns) of dtype, contiguous;
// weight: (columns,) of weight_dtype. rounds_first: to dtype before it is multiplied by the weight, too.
typedef struct {
  const void* x;
  const void* weight;
  void* y;
  int64_t rows, columns;
  float eps, shift;
  int32_t dtype, weight_dtype, rounds_first, threads;
} zp_norm;

ZP_API void zp_rms_norm(const zp_norm* norm);

enum { ZP_SILU, ZP_GELU_TANH };  // zp_gate.activation

// y = activation(gate) * up, the first factor rounded to dtype. count values of each, of dtype.
typedef struct {
  const void* gate;
  const void* up;
  void* y;
  int64_t count;
  int32_t dtype, activation, threads;
} zp_gate;

ZP_API void zp_gated(const zp_gate* gate);

// Heads of tokens. x: (batch, tokens, heads, width), contiguous. y: rows of width values, that of a sequence b, a head
// h and a token t b * batch_stride + h * head_stride + t * width values from its beginning.
typedef struct {
  const void* x;
  void* y;
  int64_t heads, batch_stride, head_stride;
} zp_heads;

// Rotary position embedding: y = x * cos + (-x's second half, x's first half) * sin of queries and keys, in float32;
// values are copied. Either may have no heads. cos, sin: (batch, tokens, width), cos_stride values from one sequence to
// the next, 0 where all share them. All of dtype; width is even.
typedef struct {
  zp_heads queries, keys, values;
  const void* cos;
  const void* sin;
  int64_t cos_stride, batch, tokens, width;
  int32_t dtype, threads;
} zp_rotation;

ZP_API void zp_rotate(const zp_rotation* rotation);

// y = softmax(scale * queries keys^T) values of each head, in float32, for the last `tokens` of `length` positions,
// each of which sees those up to its own. queries: (batch, heads, tokens, width), contiguous; keys, values: (batch,
// kv_heads, length, width), rows of width values, at the strides of zp_heads; heads / kv_heads neighbours share those
// of one. y: (batch, tokens, heads, width), contiguous. All of dtype.
typedef struct {
  const void* queries;
  const void* keys;
  const void* values;
  void* y;
  int64_t batch, heads, kv_heads, tokens, length, width;
  int64_t keys_batch_stride, keys_head_stride, values_batch_stride, values_head_stride;
  float scale;
  int32_t dtype, threads;
} zp_attention;

enum { ZP_MOST_WIDTH = 256 };  // of a head that zp_attend takes

// ZP_BAD_ARGUMENT where it has no kernel for so many tokens, or for heads so wide, that is faster than torch's.
ZP_API int zp_attend(const zp_attention* attention);

// Instruction sets, slowest first: zp_isa_name(i) is null past the end, zp_isa_why_not(i) is null when usable here.
ZP_API const char* zp_isa_name(int32_t index);
ZP_API const char* zp_isa_why_not(int32_t index);
ZP_API int zp_use_isa(int32_t index);
ZP_API int32_t zp_isa_in_use(void);

// For benchmarks: the rates that no kernel can exceed, measured by the same threads.
ZP_API int64_t zp_read_bytes(const void* data, int64_t size, int32_t threads);  // sum of words, so it must read
// Operations done by `repeats` rounds on every thread, on numbers in registers, of tiles also the loads that each needs
// from the first-level cache; 0 where the set has no such instruction.
// what: 0 float32 multiply-add, 1 byte dot product, 2 bfloat16 matrix tiles.
ZP_API double zp_peak_operations(int32_t what, int64_t repeats, int32_t threads);
ZP_API int32_t zp_version(void);

#ifdef __cplusplus
}
#endif
