// The C ABI: checks what costs nothing to check, picks an instruction set, splits the work over threads.
#include <stdlib.h>
#include <string.h>

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace zp {
namespace {

constexpr int64_t TOKENS_AT_ONCE = 1024;  // bounds the memory that prepared activations take
constexpr size_t KEEP_BYTES = 64 << 20;   // a thread's workspace larger than this is given back after the call
// Weight bytes times tokens below which a second thread costs more than it gives, and below which one that sleeps does:
// by the time it is awake, tens of microseconds later, such a job is done.
constexpr int64_t SERIAL_BYTES = 64 << 10, CALL_BYTES = 1 << 20;

// Memory that a calling thread keeps between calls.
struct Workspace {
  uint8_t* data = nullptr;
  size_t size = 0;
  ~Workspace() { free(data); }
  uint8_t* get(size_t bytes) {
    if (bytes > size) {
      free(data);
      size = (bytes + 0xffff) & ~(size_t)0xffff;
      data = (uint8_t*)aligned_alloc(64, size);
      if (!data) size = 0;
    }
    return data;
  }
  void trim() {
    if (size > KEEP_BYTES) {
      free(data);
      data = nullptr, size = 0;
    }
  }
};
thread_local Workspace workspace;

// Columns that share an activation scale: as many as one weight scale allows, at most 128 where 16-bit sums would
// overflow 32 bits (255 * 2^15 * 2 * 128 = 2^31), and all of them for int8 activations, whose scale is the token's.
int64_t activation_block(const zp_format& f, bool int8_activations) {
  if (f.group_size >= f.k) return !int8_activations ? 128 : f.k > 32768 ? 32768 : (int64_t)1 << 62;
  for (int64_t block = 128; block > 32; block /= 2) {
    if (f.group_size % block == 0) return block;
  }
  return 32;
}

struct Multiply {
  const Job* job;
  const Isa* isa;
  int64_t rows;
};

void run_prepare(void* context, int64_t chunk, int32_t) {
  const auto& c = *(const Multiply*)context;
  c.isa->prepare(*c.job, chunk);
}

void run_multiply(void* context, int64_t chunk, int32_t worker) {
  const auto& c = *(const Multiply*)context;
  int64_t n0 = chunk * c.rows, n1 = n0 + c.rows < c.job->format->n ? n0 + c.rows : c.job->format->n;
  c.isa->multiply(*c.job, n0, n1, c.job->scratch + worker * c.job->scratch_bytes);
}

const Isa& in_use();

int linear(Job job, int32_t threads) {
  const zp_format& f = *job.format;
  const Isa& isa = in_use();
  job.row_bytes = (f.k * f.bits + 7) / 8;
  job.block = activation_block(f, job.int8_activations);
  job.blocks = job.block > f.k ? 1 : (f.k + job.block - 1) / job.block;
  job.tiled = isa.tile(job);
  int64_t bytes = job.row_bytes * f.n * job.m;
  if (bytes < SERIAL_BYTES) threads = 1;
  Multiply context = {&job, &isa, isa.rows(job, threads)};
  int64_t chunks = (f.n + context.rows - 1) / context.rows;
  if (threads > chunks) threads = (int32_t)chunks;
  size_t prepared = (isa.prepared_bytes(job) + 63) & ~(size_t)63;
  job.scratch_bytes = (isa.scratch_bytes(job, context.rows) + 63) & ~(size_t)63;
  job.prepared = workspace.get(prepared + threads * job.scratch_bytes + 64);
  if (!job.prepared) return ZP_NO_MEMORY;
  job.scratch = job.prepared + prepared;
  int64_t units = (job.m + isa.tokens(job) - 1) / isa.tokens(job);
  Help help = bytes >= CALL_BYTES ? Help::called : Help::at_hand;
  parallel(job.m * f.k < (1 << 15) ? 1 : threads, units, run_prepare, &context, help);
  parallel(threads, chunks, run_multiply, &context, help);
  workspace.trim();
  return ZP_OK;
}

struct Rows {
  const Isa* isa;
  zp_weight weight;
  const int64_t* indices;
  uint8_t* out;
  int32_t dtype;
  int64_t count, step;
};

void run_rows(void* context, int64_t chunk, int32_t) {
  const auto& c = *(const Rows*)context;
  int64_t end = (chunk + 1) * c.step < c.count ? (chunk + 1) * c.step : c.count;
  size_t bytes = c.weight.format->k * (c.dtype == ZP_F32 ? 4 : 2);
  for (int64_t i = chunk * c.step; i < end; i++) {
    c.isa->decode(c.weight, c.indices ? c.indices[i] : i, c.dtype, c.out + i * bytes);
  }
}

struct Encode {
  const Isa* isa;
  const zp_format* format;
  const void* weight;
  int32_t dtype;
  uint8_t* packed;
  void* scale;
  int8_t* zero_point;
  int64_t step;
  std::atomic<int> result{ZP_OK};
};

void run_encode(void* context, int64_t chunk, int32_t) {
  auto& c = *(Encode*)context;
  int64_t end = (chunk + 1) * c.step < c.format->n ? (chunk + 1) * c.step : c.format->n;
  for (int64_t i = chunk * c.step; i < end; i++) {
    int result = c.isa->encode(*c.format, c.weight, c.dtype, i, c.packed, c.scale, c.zero_point);
    if (result != ZP_OK) c.result.store(result, std::memory_order_relaxed);
  }
}

int64_t rows_at_once(int64_t count, int64_t row_values, int32_t threads) {
  int64_t enough = 16384 / (row_values + 1) + 1, share = (count + 4 * threads - 1) / (4 * threads);
  return share < enough ? enough : share;
}

// --- instruction sets ---

const char* lacks_nothing() { return nullptr; }

#if defined(__x86_64__)
const char* lacks_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                 __builtin_cpu_supports("bmi2")
             ? nullptr
             : "this CPU has no AVX2 with FMA, F16C and BMI2";
}

const char* lacks_avx512() {
  __builtin_cpu_init();
  bool all = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512vnni");
  return all ? nullptr : "this CPU has no AVX512 (F, BW, DQ, VL) with VNNI";
}

#ifndef ZP_NO_AVX512_BF16  // the compiler knows these names
const char* lacks_avx512_bf16() {
  if (const char* why = lacks_avx512()) return why;
  bool all = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  return all ? nullptr : "this CPU has no AVX512 with BF16 and VBMI";
}
#endif

#ifndef ZP_NO_AMX
const char* lacks_amx() {
  if (const char* why = lacks_avx512_bf16()) return why;
#ifdef ZP_EMULATE_TILES
  return nullptr;
#elif defined(__linux__)
  constexpr unsigned FEATURES = 1u << 22 | 1u << 24 | 1u << 25;  // bfloat16, tiles, int8
  constexpr unsigned STATES = 3u << 17;                          // tile configuration and data, saved by the system
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & FEATURES) != FEATURES) return "this CPU has no AMX";
  __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  if ((a & STATES) != STATES) return "the operating system does not save AMX's tiles";
  static const bool permitted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
  return permitted ? nullptr : "the operating system does not permit AMX (Linux 5.16 or later does)";
#else
  return "AMX is used on Linux only";
#endif
}
#endif
#endif

struct Level {
  const Isa* isa;
  const char* (*why_not)();
};

// Slowest first. To add one: its file, its Isa in kernels.h, its line here and its flags in CMakeLists.txt.
const Level levels[] = {
    {&scalar, lacks_nothing},
#if defined(__x86_64__) && !defined(ZP_NO_AVX2)
    {&avx2, lacks_avx2},
#endif
#if defined(__x86_64__) && !defined(ZP_NO_AVX512)
    {&avx512, lacks_avx512},
#endif
#if defined(__x86_64__) && !defined(ZP_NO_AVX512_BF16)
    {&avx512_bf16, lacks_avx512_bf16},
#endif
#if defined(__x86_64__) && !defined(ZP_NO_AMX)
    {&amx, lacks_amx},
#endif
};
constexpr int32_t LEVELS = sizeof(levels) / sizeof(levels[0]);

std::atomic<int32_t> chosen{-1};

int32_t best() {
  for (int32_t i = LEVELS - 1; i > 0; i--) {
    if (!levels[i].why_not()) return i;
  }
  return 0;
}

int32_t level_in_use() {
  int32_t level = chosen.load(std::memory_order_relaxed);
  if (level < 0) chosen.store(level = best(), std::memory_order_relaxed);
  return level;
}

const Isa& in_use() { return *levels[level_in_use()].isa; }

// --- ceilings ---

struct Read {
  const Isa* isa;
  const uint8_t* data;
  int64_t size, step;
  std::atomic<int64_t> total{0};
};

void run_read(void* context, int64_t chunk, int32_t) {
  auto& c = *(Read*)context;
  int64_t begin = chunk * c.step, bytes = c.size - begin < c.step ? c.size - begin : c.step;
  c.total.fetch_add(c.isa->read(c.data + begin, bytes), std::memory_order_relaxed);
}

struct Peak {
  const Isa* isa;
  int32_t what;
  int64_t repeats;
  double operations[256];
};

void run_peak(void* context, int64_t chunk, int32_t) {
  auto& c = *(Peak*)context;
  c.operations[chunk] = c.isa->peak(c.what, c.repeats);
}

}  // namespace
}  // namespace zp

using namespace zp;

extern "C" {

int zp_linear(const zp_format* format, const void* packed, const void* scale, const void* zero_point,
              const void* levels, const void* bias, int32_t bias_dtype, const void* x, int32_t x_dtype,
              int64_t x_stride, int64_t m, int32_t int8_activations, void* y, int32_t threads) {
  int64_t y_bytes = format->n * (x_dtype == ZP_F32 ? 4 : 2), x_bytes = x_stride * (x_dtype == ZP_F32 ? 4 : 2);
  for (int64_t begin = 0; begin < m; begin += TOKENS_AT_ONCE) {
    Job job = {};
    job.format = format;
    job.packed = (const uint8_t*)packed;
    job.scale = scale;
    job.zero_point = zero_point;
    job.levels = levels;
    job.bias = bias;
    job.bias_dtype = bias_dtype;
    job.x = (const uint8_t*)x + begin * x_bytes;
    job.x_dtype = x_dtype;
    job.x_stride = x_stride;
    job.m = m - begin < TOKENS_AT_ONCE ? m - begin : TOKENS_AT_ONCE;
    job.y = (uint8_t*)y + begin * y_bytes;
    job.int8_activations = int8_activations != 0;
    int result = linear(job, threads < 1 ? 1 : threads);
    if (result != ZP_OK) return result;
  }
  return ZP_OK;
}

int zp_rows(const zp_format* format, const void* packed, const void* scale, const void* zero_point, const void* levels,
            const int64_t* indices, int64_t count, void* out, int32_t out_dtype, int32_t threads) {
  for (int64_t i = 0; indices && i < count; i++) {
    if (indices[i] < 0 || indices[i] >= format->n) return ZP_BAD_INDEX;
  }
  zp_weight weight = {format, (const uint8_t*)packed, scale, zero_point, levels};
  Rows rows = {&in_use(), weight, indices, (uint8_t*)out, out_dtype, count, 0};
  rows.step = rows_at_once(count, format->k, threads);
  parallel(threads, (count + rows.step - 1) / rows.step, run_rows, &rows);
  return ZP_OK;
}

int zp_quantize(const zp_format* format, const void* weight, int32_t dtype, void* packed, void* scale, void* zero_point,
                int32_t threads) {
  Encode encode;
  encode.isa = &in_use();
  encode.format = format;
  encode.weight = weight;
  encode.dtype = dtype;
  encode.packed = (uint8_t*)packed;
  encode.scale = scale;
  encode.zero_point = (int8_t*)zero_point;
  encode.step = rows_at_once(format->n, format->k, threads);
  parallel(threads, (format->n + encode.step - 1) / encode.step, run_encode, &encode);
  return encode.result.load();
}

const char* zp_isa_name(int32_t index) { return index >= 0 && index < LEVELS ? levels[index].isa->name : nullptr; }

const char* zp_isa_why_not(int32_t index) {
  return index >= 0 && index < LEVELS ? levels[index].why_not() : "there is no such instruction set";
}

int zp_use_isa(int32_t index) {
  if (zp_isa_why_not(index)) return ZP_BAD_ARGUMENT;
  chosen.store(index, std::memory_order_relaxed);
  return ZP_OK;
}

int32_t zp_isa_in_use(void) { return level_in_use(); }

int64_t zp_read_bytes(const void* data, int64_t size, int32_t threads) {
  Read read;
  read.isa = &in_use();
  read.data = (const uint8_t*)data;
  read.size = size;
  read.step = 256 << 10;
  parallel(threads, (size + read.step - 1) / read.step, run_read, &read);
  return read.total.load();
}

double zp_peak_operations(int32_t what, int64_t repeats, int32_t threads) {
  Peak peak = {&in_use(), what, repeats, {}};
  int32_t count = threads < 256 ? threads : 256;
  parallel(threads, count, run_peak, &peak);
  double total = 0;
  for (int32_t i = 0; i < count; i++) total += peak.operations[i];
  return total;
}

int32_t zp_version(void) { return ZP_VERSION; }

}  // extern "C"
