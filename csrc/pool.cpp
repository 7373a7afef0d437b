// A small pool of threads whose work is counted in chunks, not in threads: whoever is awake takes the next chunk, and
// a call returns when all chunks are done, so a worker that the machine has put aside costs nothing unless it was put
// aside in the middle of a chunk. (An OpenMP barrier waits for every thread: a scheduler slice on a busy machine.)
#include "pool.h"

#include <dlfcn.h>
#include <pthread.h>
#include <time.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

namespace zp {
namespace {

constexpr int32_t MOST_WORKERS = 255;
constexpr int SPINS = 2000;  // looks for work before a worker sleeps: some tens of microseconds

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

template <class Condition>
void wait_until(Condition holds) {
  for (int spins = 0; !holds(); spins++) spins < SPINS ? pause() : std::this_thread::yield();
}

struct Pool {
  std::mutex caller;  // one job at a time; a second caller works alone
  // A job is published as one number, epoch << 32 | chunks left to take, so that a worker which wakes late cannot take
  // a chunk of a job it has not read: its compare-and-swap fails.
  std::atomic<uint64_t> ticket{0};
  std::atomic<uint32_t> unfinished{0};
  std::atomic<int32_t> wanted{0};  // workers 1 .. wanted - 1 take part
  std::atomic<Chunk> run{nullptr};
  std::atomic<void*> context{nullptr};
  std::mutex sleep;
  std::condition_variable wake;
  std::atomic<int32_t> sleeping{0};
  int32_t started = 1;

  // Takes chunks until none is left. True when it did any.
  bool work(int32_t worker) {
    bool any = false;
    uint64_t ticket_seen = ticket.load(std::memory_order_acquire);
    while ((uint32_t)ticket_seen != 0) {
      if (worker >= wanted.load(std::memory_order_relaxed)) return any;
      Chunk function = run.load(std::memory_order_relaxed);
      void* argument = context.load(std::memory_order_relaxed);
      if (!ticket.compare_exchange_weak(ticket_seen, ticket_seen - 1, std::memory_order_acq_rel)) continue;
      function(argument, (int64_t)(uint32_t)ticket_seen - 1, worker);
      unfinished.fetch_sub(1, std::memory_order_acq_rel);
      any = true;
      ticket_seen = ticket.load(std::memory_order_acquire);
    }
    return any;
  }

  void serve(int32_t worker) {
    int idle = 0;
    for (;;) {
      if (work(worker)) idle = 0;
      if (++idle < SPINS) {
        pause();
        continue;
      }
      std::unique_lock<std::mutex> lock(sleep);
      sleeping.fetch_add(1, std::memory_order_seq_cst);
      wake.wait(lock, [&] {
        return (uint32_t)ticket.load(std::memory_order_seq_cst) != 0 && worker < wanted.load(std::memory_order_relaxed);
      });
      sleeping.fetch_sub(1, std::memory_order_relaxed);
      idle = 0;
    }
  }

  void start(int32_t threads) {
    for (; started < threads && started < MOST_WORKERS; started++) {
      std::thread([this, worker = started] { serve(worker); }).detach();
    }
  }

  void call(int32_t threads, int64_t count, Chunk function, void* argument, bool wake_them) {
    start(threads);
    run.store(function, std::memory_order_relaxed);
    context.store(argument, std::memory_order_relaxed);
    wanted.store(threads, std::memory_order_relaxed);
    unfinished.store((uint32_t)count, std::memory_order_relaxed);
    uint64_t epoch = (ticket.load(std::memory_order_relaxed) >> 32) + 1;
    ticket.store(epoch << 32 | (uint64_t)count, std::memory_order_seq_cst);
    if (wake_them && sleeping.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(sleep);
      wake.notify_all();
    }
    work(0);
    wait_until([&] { return unfinished.load(std::memory_order_acquire) == 0; });
  }
};

// Never destroyed: detached workers may outlive main.
alignas(Pool) unsigned char storage[sizeof(Pool)];
Pool* pool = nullptr;

// --- OpenMP's threads, where the process has some (torch's): found, never linked ---
//
// Between torch's operators they spin on the cores that the pool's workers need. Its regions end with a barrier,
// though: where a thread comes late after the last chunk was done, for a quarter of the region or more, the machine may
// be busy or the threads were asleep, and the next jobs are the pool's: a few at first, more where that happens again
// before as many came in time.

using Region = void (*)(void (*)(void*), void*, unsigned, unsigned);
Region gomp_parallel = nullptr;

struct Patience {
  static constexpr int32_t FEWEST = 16, GROWTH = 4;
  const int64_t late;  // nanoseconds
  const int32_t most;  // jobs in a row
  std::atomic<int32_t> avoid{FEWEST}, left{0}, in_time{0};

  bool has_ended() {
    int32_t jobs = left.load(std::memory_order_relaxed);
    if (jobs > 0) left.store(jobs - 1, std::memory_order_relaxed);
    return jobs <= 0;
  }
  void came_late() {
    int32_t jobs = avoid.load(std::memory_order_relaxed);
    left.store(jobs, std::memory_order_relaxed);
    in_time.store(0, std::memory_order_relaxed);
    avoid.store(jobs * GROWTH < most ? jobs * GROWTH : most, std::memory_order_relaxed);
  }
  void came_in_time() {
    int32_t jobs = avoid.load(std::memory_order_relaxed), good = in_time.load(std::memory_order_relaxed) + 1;
    if (jobs == FEWEST) return;
    in_time.store(good < jobs ? good : 0, std::memory_order_relaxed);
    if (good >= jobs) avoid.store(jobs / GROWTH > FEWEST ? jobs / GROWTH : FEWEST, std::memory_order_relaxed);
  }
};
Patience of_called{200000, 100}, of_at_hand{20000, 1000};

int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * (int64_t)1000000000 + t.tv_nsec;
}

struct Team {
  Chunk run;
  void* context;
  int64_t count;
  std::atomic<int64_t> next{0}, unfinished{count}, finished{0};
  std::atomic<int32_t> entered{0};
};

void take_chunks(void* argument) {
  Team& team = *(Team*)argument;
  int32_t worker = team.entered.fetch_add(1);
  for (int64_t i; (i = team.next.fetch_add(1)) < team.count;) {
    team.run(team.context, i, worker);
    if (team.unfinished.fetch_sub(1) == 1) team.finished.store(now());
  }
}

bool with_openmp(int32_t threads, int64_t count, Chunk run, void* context, Patience& patience) {
  if (!gomp_parallel || !patience.has_ended()) return false;
  Team team = {run, context, count};
  int64_t begin = now();
  gomp_parallel(take_chunks, &team, (unsigned)threads, 0);
  int64_t end = now(), late = end - team.finished.load();
  late > patience.late && 4 * late > end - begin ? patience.came_late() : patience.came_in_time();
  return true;
}

void make_pool() { pool = new (storage) Pool; }

void after_fork() {  // the parent's workers are not there, of neither kind
  make_pool();
  gomp_parallel = nullptr;
}

struct Start {
  Start() {
    make_pool();
    gomp_parallel = (Region)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    pthread_atfork(nullptr, nullptr, after_fork);
  }
} start;

}  // namespace

void wait_for(const std::atomic<int64_t>& counter, int64_t value) {
  wait_until([&] { return counter.load(std::memory_order_acquire) >= value; });
}

void parallel(int32_t threads, int64_t count, Chunk run, void* context, Help help) {
  if (threads > MOST_WORKERS) threads = MOST_WORKERS;
  if (threads > 1 && count > 1 && count < ((int64_t)1 << 31)) {
    if (with_openmp(threads, count, run, context, help == Help::called ? of_called : of_at_hand)) return;
    if (pool->caller.try_lock()) {
      pool->call(threads, count, run, context, help == Help::called);
      pool->caller.unlock();
      return;
    }
  }
  for (int64_t i = 0; i < count; i++) run(context, i, 0);
}

}  // namespace zp
