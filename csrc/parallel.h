// Parallel loops on the thread pool that torch already owns.
//
// The pool is reached through a function pointer taken from libtorch at import time (torch's stable C shim
// `torch_parallel_for`, torch >= 2.10) or, before that, through the GOMP_parallel that torch is linked to. So this
// library links no OpenMP runtime of its own, and torch.set_num_threads holds from any Python thread.
#pragma once
#include <atomic>
#include <cstdint>

namespace fusetune {

// Runs worker(ctx) on up to num_threads() threads at once. With one thread, inside another parallel region, or in
// a forked child whose parent had a pool, it runs on the caller alone: a worker must therefore take chunks until none
// is left.
void run_workers(void (*worker)(void*), void* ctx);
int num_threads();
// Threads that took part in the last call of run_workers: for the test that counts them.
int last_region_threads();
// Name of the pool in use: "torch", "gomp" or "serial".
const char* pool_name();
// Addresses of torch_parallel_for and torch_get_num_threads, 0 where this torch has none.
void set_torch_pool(uintptr_t parallel_for, uintptr_t get_num_threads);
// For torch without them: addresses of the GOMP_parallel that libtorch is linked to and of at::get_num_threads.
void set_gomp_pool(uintptr_t parallel, uintptr_t get_num_threads);

// Calls f(chunk) for every chunk in [0, chunks), handed out one by one so that a descheduled core costs one
// chunk and not its whole share.
template <class F>
void parallel_chunks(int64_t chunks, const F& f) {
  if (chunks <= 0) return;
  if (chunks == 1) return f(0);
  struct Context {
    const F* f;
    int64_t chunks;
    std::atomic<int64_t> next{0};
  } ctx{&f, chunks};
  run_workers(
      [](void* p) {
        auto& c = *static_cast<Context*>(p);
        for (int64_t i; (i = c.next.fetch_add(1, std::memory_order_relaxed)) < c.chunks;) (*c.f)(i);
      },
      &ctx);
}

}  // namespace fusetune
