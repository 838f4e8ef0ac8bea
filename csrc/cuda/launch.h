// What the launchers share.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "launchers.h"

namespace fusetune {

inline int log2_of(int64_t power) {
  int log2 = 0;
  while (int64_t{1} << log2 < power) ++log2;
  return log2;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of the current device; 1 where there is none.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 1;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) {
    cudaGetLastError();  // is not to be found by the next launch
    return 1;
  }
  return value;
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Parts of `units` pieces of inner dimension such that about `wanted` CTAs run, each with `least` pieces or more, and
// none is without work.
inline int choose_splits(int64_t tiles, int64_t wanted, int64_t units, int64_t least) {
  const int64_t splits = std::max<int64_t>(1, std::min(wanted / std::max<int64_t>(tiles, 1), units / least));
  return static_cast<int>(ceil_div(units, ceil_div(units, splits)));
}

// Of sum_splits.
inline dim3 sum_grid(int64_t m, int64_t cols) {
  return dim3(static_cast<unsigned>(ceil_div(cols, 1024)), static_cast<unsigned>(m));
}

// mma tiles of 8 rows a CTA takes for m rows: 2, 4 or 8.
inline int row_tiles(int64_t m) { return m <= 16 ? 2 : m <= 32 ? 4 : 8; }

}  // namespace fusetune
