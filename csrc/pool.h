// Threads that share the chunks of a job. The files of instruction sets do not include this: they may share no inline
// function.
#pragma once
#include <stdint.h>

#include <atomic>

namespace zp {

// Chunks 0 .. count - 1 of run(context, chunk, worker), worker in 0 .. threads - 1. Returns when all are done.
enum class Help {
  at_hand,  // from the threads of torch's operators while they spin, or the pool's workers that still look for work
  called,   // from the threads of torch's operators; where there are none or they come late, from all of the pool's
};
using Chunk = void (*)(void* context, int64_t chunk, int32_t worker);
void parallel(int32_t threads, int64_t count, Chunk run, void* context, Help help = Help::called);
void wait_for(const std::atomic<int64_t>& counter, int64_t value);  // that another thread is about to reach

}  // namespace zp
