#include "blocks.h"

#include <sys/mman.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

namespace fusetune {
namespace {

constexpr size_t kPage = 4096, kHugePage = size_t{2} << 20;

// Never destroyed: tensors may outlive static objects.
struct Pool {
  std::mutex mutex;
  std::map<size_t, std::vector<void*>> free;  // by size
};
Pool& pool() {
  static Pool* const only = new Pool;
  return *only;
}

size_t whole_pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

void* map_block(size_t size) {
  void* const whole = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (whole == MAP_FAILED) return nullptr;
  // The kernel uses huge pages for whole ones only: begin with one.
  const auto from = reinterpret_cast<uintptr_t>(whole), begin = (from + kHugePage - 1) / kHugePage * kHugePage;
  if (begin > from) munmap(whole, begin - from);
  const uintptr_t end = begin + size, mapped = from + size + kHugePage;
  if (mapped > end) munmap(reinterpret_cast<void*>(end), mapped - end);
  void* const block = reinterpret_cast<void*>(begin);
#if defined(MADV_HUGEPAGE)
  madvise(block, size, MADV_HUGEPAGE);
#endif
  return block;
}

// Unmaps free blocks, the largest first, until `wanted` bytes are gone or none is left. Bytes of them.
size_t unmap_free(Pool& p, size_t wanted) {
  size_t gone = 0;
  while (gone < wanted && !p.free.empty()) {
    const auto largest = std::prev(p.free.end());
    munmap(largest->second.back(), largest->first);
    gone += largest->first;
    largest->second.pop_back();
    if (largest->second.empty()) p.free.erase(largest);
  }
  return gone;
}

}  // namespace

// Where the lock is taken, also by a thread that a fork has left behind, the pool is passed by.
void* take_block(size_t bytes) {
  const size_t size = whole_pages(bytes);
  Pool& p = pool();
  const std::unique_lock<std::mutex> lock(p.mutex, std::try_to_lock);
  if (!lock) return map_block(size);
  const auto found = p.free.find(size);
  if (found == p.free.end()) {
    unmap_free(p, size);  // so that the pool never holds more than was in use at once
    return map_block(size);
  }
  void* const block = found->second.back();
  found->second.pop_back();
  if (found->second.empty()) p.free.erase(found);
  return block;
}

void give_block(void* block, size_t bytes) {
  const size_t size = whole_pages(bytes);
  Pool& p = pool();
  const std::unique_lock<std::mutex> lock(p.mutex, std::try_to_lock);
  if (!lock) {
    munmap(block, size);
    return;
  }
  p.free[size].push_back(block);
}

size_t release_blocks() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  return unmap_free(p, SIZE_MAX);
}

}  // namespace fusetune
