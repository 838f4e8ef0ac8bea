// Scratch memory of a thread: grown on demand, kept for the next call, freed with the thread.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

namespace fusetune {
namespace FUSETUNE_ISA {

// At least `count` floats, aligned to 64 bytes, valid until the next call on this thread for the same purpose.
enum class Purpose { task, shared };
template <Purpose purpose = Purpose::task>
static inline float* workspace(int64_t count) {
  struct Buffer {
    float* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffer;
  if (buffer.size < count) {
    std::free(buffer.data);
    buffer.size = 0;
    const size_t bytes = static_cast<size_t>((count + 15) / 16) * 64;
    buffer.data = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (!buffer.data) throw std::bad_alloc();
    buffer.size = count;
  }
  return buffer.data;
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
