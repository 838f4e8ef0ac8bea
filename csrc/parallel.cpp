#include "parallel.h"

#include <pthread.h>

namespace fusetune {
namespace {

using RangeFn = void (*)(int64_t, int64_t, void*);
using TorchParallelFor = int32_t (*)(int64_t, int64_t, int64_t, RangeFn, void*);
using TorchNumThreads = int32_t (*)(uint32_t*);
using AtNumThreads = int (*)();
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

TorchParallelFor torch_parallel_for = nullptr;
TorchNumThreads torch_get_num_threads = nullptr;
GompParallel gomp_parallel = nullptr;
AtNumThreads at_get_num_threads = nullptr;
std::atomic<int> region_threads{0};

// OpenMP's threads do not survive a fork, but its bookkeeping does: a region in the child would wait for them forever.
std::atomic<bool> pool_started{false};
bool pool_lost = false;  // set in a child, before it has threads

[[maybe_unused]] const int fork_handler =
    pthread_atfork(nullptr, nullptr, [] { pool_lost = pool_started.load(std::memory_order_relaxed); });

struct Call {
  void (*worker)(void*);
  void* ctx;
};

void enter(void* p) {
  region_threads.fetch_add(1, std::memory_order_relaxed);
  auto* call = static_cast<Call*>(p);
  call->worker(call->ctx);
}

}  // namespace

void set_torch_pool(uintptr_t parallel_for, uintptr_t get_num_threads) {
  torch_parallel_for = reinterpret_cast<TorchParallelFor>(parallel_for);
  torch_get_num_threads = reinterpret_cast<TorchNumThreads>(get_num_threads);
}

void set_gomp_pool(uintptr_t parallel, uintptr_t get_num_threads) {
  gomp_parallel = reinterpret_cast<GompParallel>(parallel);
  at_get_num_threads = reinterpret_cast<AtNumThreads>(get_num_threads);
}

const char* pool_name() { return torch_parallel_for ? "torch" : gomp_parallel ? "gomp" : "serial"; }

int num_threads() {
  if (pool_lost) return 1;
  if (torch_parallel_for) {
    uint32_t n = 1;
    return torch_get_num_threads(&n) == 0 ? static_cast<int>(n) : 1;
  }
  return gomp_parallel ? at_get_num_threads() : 1;
}

int last_region_threads() { return region_threads.load(); }

void run_workers(void (*worker)(void*), void* ctx) {
  const int n = num_threads();
  region_threads.store(0);
  Call call{worker, ctx};
  if (n > 1) pool_started.store(true, std::memory_order_relaxed);
  if (n > 1 && torch_parallel_for) {
    torch_parallel_for(0, n, 1, [](int64_t, int64_t, void* p) { enter(p); }, &call);
  } else if (n > 1 && gomp_parallel) {
    gomp_parallel(enter, &call, static_cast<unsigned>(n), 0);
  } else {
    enter(&call);
  }
}

}  // namespace fusetune
