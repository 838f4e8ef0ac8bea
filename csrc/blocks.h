// Memory for the large results of kernels, kept for the next one when it is freed.
//
// The C library gives blocks of some MB back to the system as soon as they are freed, and the first write to each page
// of a new one is a fault that has the page cleared: for 12 MB some 2 ms, a quarter of many a computation whose result
// that is; for the logits of a large vocabulary a tenth of a second and more. A training step asks for the same
// sizes again and again, and its peak is where most is in use.
#pragma once
#include <cstddef>

namespace fusetune {

// `bytes` of memory with undefined content, in huge pages where the system has them; null where it has no memory.
void* take_block(size_t bytes);
// Gives it back, with the size that it was taken with. From any thread.
void give_block(void* block, size_t bytes);
// Returns to the system what is not in use. Bytes of it.
size_t release_blocks();

}  // namespace fusetune
