// The C ABI: checks what costs nothing to check, picks an instruction set, splits the work over threads.
#include <stdlib.h>
#include <string.h>

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"
#include "pool.h"

namespace zp {
namespace {

constexpr int64_t TOKENS_AT_ONCE = 1024;  // bounds the memory that prepared activations take
constexpr size_t KEEP_BYTES = 64 << 20;   // a thread's workspace larger than this is given back after the call
constexpr size_t HUGE_PAGE = 2 << 20;
// From here on malloc's memory is always fresh from the system, with a fault for each page.
constexpr int64_t FRESH_BYTES = 32 << 20;
// Weight bytes times tokens below which a second thread costs more than it gives, and below which one that sleeps does:
// by the time it is awake, tens of microseconds later, such a job is done.
constexpr int64_t SERIAL_BYTES = 64 << 10, CALL_BYTES = 1 << 20;

int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

int64_t float_bytes(int32_t dtype) { return dtype == ZP_F32 ? 4 : 2; }

// Asks for huge pages where `data` has some: fresh memory is had with fewer faults then, and read faster. Where
// refused, small ones serve as well.
void use_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  uintptr_t begin = ((uintptr_t)data + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1),
            end = ((uintptr_t)data + bytes) & ~(HUGE_PAGE - 1);
  if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

// Memory that a calling thread keeps between calls.
struct Workspace {
  uint8_t* data = nullptr;
  size_t size = 0;
  ~Workspace() { free(data); }
  uint8_t* get(size_t bytes) {
    if (bytes > size) {
      free(data);
      size_t unit = bytes < HUGE_PAGE ? 1 << 16 : HUGE_PAGE;
      size = (bytes + unit - 1) & ~(unit - 1);
      data = (uint8_t*)aligned_alloc(unit < HUGE_PAGE ? 64 : HUGE_PAGE, size);
      if (!data) size = 0;
      use_huge_pages(data, size);
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

// Neighbouring chunks, which one thread takes one after the other, as long as none has to help it: what it fetches
// ahead at the end of one is the beginning of the next.
struct alignas(64) Stretch {
  std::atomic<int64_t> next;
  int64_t end;
};

constexpr int64_t STRETCHES = 16;  // more threads share them

// Tokens that are prepared together. Where there are several pieces each thread begins with one of its own, whose
// tokens are then in its cache, and helps with the others afterwards.
struct alignas(64) Piece {
  Job job;
  int64_t units;
  std::atomic<int64_t> next_unit{0}, prepared{0};
  Stretch stretch[STRETCHES];
};

constexpr int64_t PIECE = 256, PIECES = TOKENS_AT_ONCE / PIECE;

// Rows are unpacked once for each piece, which pays where they are not many more than tokens.
int64_t pieces_of(const Job& j, int32_t threads) {
  int64_t most = j.m / PIECE < threads ? j.m / PIECE : threads;
  return j.tiled && j.format->n <= 2 * j.m && most > 1 ? most : 1;
}

struct Multiply {
  const Isa* isa;
  int64_t pieces, stretches, rows;  // rows: of weight, in a chunk
  uint8_t* scratch;                 // threads x scratch_bytes
  size_t scratch_bytes;
  Piece piece[PIECES];
};

// What each thread does.
void run_multiply(void* context, int64_t, int32_t worker) {
  auto& c = *(Multiply*)context;
  for (int64_t i = 0; i < c.pieces; i++) {
    Piece& p = c.piece[(worker + i) % c.pieces];
    for (int64_t unit; (unit = p.next_unit.fetch_add(1, std::memory_order_relaxed)) < p.units;) {
      c.isa->prepare(p.job, unit);
      p.prepared.fetch_add(1, std::memory_order_release);
    }
    wait_for(p.prepared, p.units);
    for (int64_t s = 0; s < c.stretches; s++) {
      Stretch& stretch = p.stretch[(worker + s) % c.stretches];
      for (int64_t chunk; (chunk = stretch.next.fetch_add(1, std::memory_order_relaxed)) < stretch.end;) {
        int64_t n = p.job.format->n, n0 = chunk * c.rows, n1 = n0 + c.rows < n ? n0 + c.rows : n;
        c.isa->multiply(p.job, n0, n1, c.scratch + worker * c.scratch_bytes);
      }
    }
  }
}

const Isa& in_use();

int linear(Job job, int32_t threads) {
  const zp_format& f = *job.format;
  const Isa& isa = in_use();
  job.row_bytes = (f.k * f.bits + 7) / 8;
  job.block = activation_block(f, job.int8_activations);
  job.blocks = job.block > f.k ? 1 : ceil_div(f.k, job.block);
  job.tiled = isa.tile(job);
  int64_t bytes = job.row_bytes * f.n * job.m;
  if (bytes < SERIAL_BYTES) threads = 1;
  Multiply c;
  c.isa = &isa;
  int64_t tokens = round_up(ceil_div(job.m, pieces_of(job, threads)), isa.tokens(job));
  c.pieces = ceil_div(job.m, tokens);
  size_t prepared = 0;
  for (int64_t i = 0, m = 0; i < c.pieces; i++, m += tokens) {
    Piece& p = c.piece[i];
    p.job = job;
    p.job.m = job.m - m < tokens ? job.m - m : tokens;
    p.job.x = (const uint8_t*)job.x + m * job.x_stride * float_bytes(job.x_dtype);
    p.job.y = (uint8_t*)job.y + m * f.n * float_bytes(job.x_dtype);
    p.units = ceil_div(p.job.m, isa.tokens(p.job));
    prepared += round_up(isa.prepared_bytes(p.job), 64);
  }
  c.rows = isa.rows(c.piece[0].job, (int32_t)ceil_div(threads, c.pieces));
  int64_t chunks = ceil_div(f.n, c.rows);
  if (threads > chunks * c.pieces) threads = (int32_t)(chunks * c.pieces);
  c.stretches = threads < STRETCHES ? threads : STRETCHES;
  c.scratch_bytes = 0;
  for (int64_t i = 0; i < c.pieces; i++) {
    size_t wanted = round_up(isa.scratch_bytes(c.piece[i].job, c.rows), 64);
    if (wanted > c.scratch_bytes) c.scratch_bytes = wanted;
    for (int64_t s = 0; s < c.stretches; s++) {
      c.piece[i].stretch[s].next = s * chunks / c.stretches;
      c.piece[i].stretch[s].end = (s + 1) * chunks / c.stretches;
    }
  }
  c.scratch = workspace.get(threads * c.scratch_bytes + prepared + 64);
  if (!c.scratch) return ZP_NO_MEMORY;
  uint8_t* memory = c.scratch + threads * c.scratch_bytes;
  for (int64_t i = 0; i < c.pieces; i++) {
    c.piece[i].job.prepared = memory;
    memory += round_up(isa.prepared_bytes(c.piece[i].job), 64);
  }
  parallel(threads, threads, run_multiply, &c, bytes >= CALL_BYTES ? Help::called : Help::at_hand);
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
  size_t bytes = c.weight.format->k * float_bytes(c.dtype);
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

// A contiguous part of the values for each thread, as torch's own operators cut them: the neighbours of these in a
// model.
template <class Values>
struct Between {
  const Isa* isa;
  const Values* values;
  int64_t step, count;
};

// `function` on all of `count` values, or rows, of so many bytes altogether.
template <class Values, void (*Isa::*function)(const Values&, int64_t, int64_t)>
void between(const Values& values, int64_t count, int64_t bytes, int64_t multiple) {
  const Isa& isa = in_use();
  int32_t threads = values.threads < 1 || bytes < SERIAL_BYTES ? 1 : values.threads;
  Between<Values> c = {&isa, &values, round_up(ceil_div(count, threads), multiple), count};
  Chunk run = [](void* context, int64_t chunk, int32_t) {
    const auto& b = *(const Between<Values>*)context;
    int64_t begin = chunk * b.step, end = begin + b.step < b.count ? begin + b.step : b.count;
    (b.isa->*function)(*b.values, begin, end);
  };
  if (count > 0) parallel(threads, ceil_div(count, c.step), run, &c, Help::at_hand);
}

// Attention of many tokens: first what all share, then block after block.
struct Attend {
  const ManyTokens* kernel;
  const zp_attention* attention;
  uint8_t* arranged;
};

int attend_many(const ManyTokens& kernel, const zp_attention& a) {
  Attend c = {&kernel, &a, workspace.get(kernel.arranged_bytes(a))};
  if (!c.arranged) return ZP_NO_MEMORY;
  int32_t threads = a.threads < 1 ? 1 : a.threads;
  Chunk arrange = [](void* context, int64_t unit, int32_t) {
    const auto& b = *(const Attend*)context;
    b.kernel->arrange(*b.attention, unit, b.arranged);
  };
  Chunk run = [](void* context, int64_t block, int32_t) {
    const auto& b = *(const Attend*)context;
    b.kernel->attend(*b.attention, block, b.arranged);
  };
  parallel(threads, kernel.arrangements(a), arrange, &c, Help::at_hand);
  parallel(threads, kernel.blocks(a), run, &c);
  workspace.trim();
  return ZP_OK;
}

int64_t rows_at_once(int64_t count, int64_t row_values, int32_t threads) {
  int64_t enough = 16384 / (row_values + 1) + 1, share = ceil_div(count, 4 * threads);
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

const char* lacks_avx_vnni() {
  if (const char* why = lacks_avx2()) return why;
  unsigned a, b, c, d;
  bool has = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
  return has ? nullptr : "this CPU has no AVX-VNNI";
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
#if defined(__x86_64__) && !defined(ZP_NO_AVX_VNNI)
    {&avx_vnni, lacks_avx_vnni},
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

int zp_linear(const zp_product* product) {
  const zp_product& p = *product;
  int64_t y_bytes = p.weight.format->n * float_bytes(p.x_dtype), x_bytes = p.x_stride * float_bytes(p.x_dtype);
  if (p.m * y_bytes >= FRESH_BYTES) use_huge_pages(p.y, p.m * y_bytes);
  for (int64_t begin = 0; begin < p.m; begin += TOKENS_AT_ONCE) {
    Job job = {};
    job.format = p.weight.format;
    job.packed = p.weight.packed;
    job.scale = p.weight.scale;
    job.zero_point = p.weight.zero_point;
    job.levels = p.weight.levels;
    job.bias = p.bias;
    job.bias_dtype = p.bias_dtype;
    job.x = (const uint8_t*)p.x + begin * x_bytes;
    job.x_dtype = p.x_dtype;
    job.x_stride = p.x_stride;
    job.m = p.m - begin < TOKENS_AT_ONCE ? p.m - begin : TOKENS_AT_ONCE;
    job.y = (uint8_t*)p.y + begin * y_bytes;
    job.int8_activations = p.int8_activations != 0;
    int result = linear(job, p.threads < 1 ? 1 : p.threads);
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
  use_huge_pages(out, count * format->k * float_bytes(out_dtype));
  rows.step = rows_at_once(count, format->k, threads);
  parallel(threads, ceil_div(count, rows.step), run_rows, &rows);
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
  parallel(threads, ceil_div(format->n, encode.step), run_encode, &encode);
  return encode.result.load();
}

void zp_rms_norm(const zp_norm* norm) {
  between<zp_norm, &Isa::normalize>(*norm, norm->rows, norm->rows * norm->columns * float_bytes(norm->dtype), 1);
}

void zp_gated(const zp_gate* gate) {
  between<zp_gate, &Isa::gate>(*gate, gate->count, gate->count * float_bytes(gate->dtype), 64);
}

void zp_rotate(const zp_rotation* r) {
  int64_t heads = r->queries.heads + r->keys.heads + r->values.heads, tokens = r->batch * r->tokens;
  between<zp_rotation, &Isa::rotate>(*r, tokens, tokens * heads * r->width * float_bytes(r->dtype), 1);
}

int zp_attend(const zp_attention* a) {
  constexpr int64_t FEW = 4;  // for which it is not worth while to arrange keys and values
  const ManyTokens* many = in_use().many_tokens;
  if (a->width > ZP_MOST_WIDTH) return ZP_BAD_ARGUMENT;
  if (a->tokens > FEW) return many && many->takes(*a) ? attend_many(*many, *a) : ZP_BAD_ARGUMENT;
  if (!in_use().attend) return ZP_BAD_ARGUMENT;
  int64_t units = a->batch * a->kv_heads * a->tokens;
  between<zp_attention, &Isa::attend>(*a, units, 2 * units * a->length * a->width * float_bytes(a->dtype), 1);
  return ZP_OK;
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
  parallel(threads, ceil_div(size, read.step), run_read, &read);
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
