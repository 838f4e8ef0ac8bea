// Rows that are gone over element by element, in whole vectors and a cut one at the end.
#pragma once
#include <algorithm>

#include "../parallel.h"
#include "isa/isa.h"

namespace fusetune::FUSETUNE_ISA {

template <class T>
FUSETUNE_INLINE F read(const T* p, int lanes) {
  return lanes == kLanes ? load(p) : load_part(p, lanes);
}

template <class T>
FUSETUNE_INLINE void write(T* p, F v, int lanes) {
  if (lanes == kLanes) return store(p, v);
  store_part(p, v, lanes);
}

// Calls f(i, lanes) for the vectors of [begin, end), `unroll` at a time; lanes is kLanes but for the last one.
template <int unroll, class Function>
FUSETUNE_INLINE void for_vectors(int64_t begin, int64_t end, const Function& f) {
  constexpr int64_t kStep = unroll * kLanes;
  int64_t i = begin;
  for (; i + kStep <= end; i += kStep) {
    for (int u = 0; u < unroll; ++u) f(i + u * kLanes, kLanes);
  }
  for (; i < end; i += kLanes) f(i, static_cast<int>(std::min<int64_t>(kLanes, end - i)));
}

// Calls f(row) for m rows of n elements, some 16 Ki elements to a task.
template <class Function>
static void for_rows_of(int64_t m, int64_t n, const Function& f) {
  const int64_t rows = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, n));
  parallel_chunks((m + rows - 1) / rows, [&](int64_t chunk) {
    for (int64_t row = chunk * rows, end = std::min(m, row + rows); row < end; ++row) f(row);
  });
}

}  // namespace fusetune::FUSETUNE_ISA
