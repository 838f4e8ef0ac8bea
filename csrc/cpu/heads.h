// Heads of an attention as fp32 matrices [tokens, padded(D)] and their transposes, whatever they are stored in.
#pragma once
#include <algorithm>

#include "../parallel.h"
#include "float_rows.h"

namespace fusetune::FUSETUNE_ISA {

constexpr int64_t kQueries = 48;  // of a block

// How many queries of a head a task takes, in whole blocks: all, where each thread still has enough tasks. What is laid
// out for a task's keys is then laid out once.
static inline int64_t task_queries(int64_t tokens, int64_t heads) {
  constexpr int64_t kTasksPerThread = 8;
  const int64_t blocks = std::max<int64_t>(1, (tokens + kQueries - 1) / kQueries);
  const int64_t wanted = kTasksPerThread * num_threads() / std::max<int64_t>(1, heads);
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, blocks));
  return (blocks + parts - 1) / parts * kQueries;
}

static inline int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

static inline void* address_of(const Heads& x, int64_t b, int64_t head, int64_t token) {
  const int64_t size = x.dtype == Dtype::f32 ? 4 : 2;
  return static_cast<char*>(x.data) + (b * x.batch + head * x.head + token * x.token) * size;
}
static inline Matrix rows_of(const Heads& x, int64_t b, int64_t head, int64_t token) {
  return {address_of(x, b, head, token), x.token, x.dtype};
}

// rows [count, D] times factor -> [count, padded(D)], with zeros up to whole vectors.
static inline void pack_rows(const Matrix& rows, int64_t count, int64_t dim, float factor, float* to) {
  with_type(rows.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t j = 0; j < count; ++j, to += padded(dim)) {
      const T* x = static_cast<const T*>(rows.data) + j * rows.ld;
      int64_t d = 0;
      for (; d + kLanes <= dim; d += kLanes) store(to + d, mul(load(x + d), set1(factor)));
      if (d < dim) store(to + d, mul(load_part(x + d, static_cast<int>(dim - d)), set1(factor)));
    }
  });
}

// rows [count, D], which can be read in whole vectors -> [D, padded(count)] times factor, with zeros in the padding; its
// rows lie to_ld apart.
static inline void transpose_rows(const Floats2d& rows, int64_t count, int64_t dim, float factor, float* to,
                                  int64_t to_ld) {
  for (int64_t j = 0; j < padded(count); j += kLanes) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      F block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = j + i < count ? mul(load(rows.row(j + i) + d), set1(factor)) : zero();
      transpose(block);
      for (int i = 0; i < kLanes && d + i < dim; ++i) store(to + (d + i) * to_ld + j, block[i]);
    }
  }
}

template <class T>
static float dot(const float* x, const T* y, int64_t n) {
  F sum = zero();
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) sum = fma(load(x + d), load(y + d), sum);
  if (d < n) {
    const int lanes = static_cast<int>(n - d);
    sum = fma(load_part(x + d, lanes), load_part(y + d, lanes), sum);
  }
  return hsum(sum);
}

// to [n] = factor from; `from` can be read in whole vectors.
template <class T>
static void store_scaled_row(const float* from, float factor, int64_t n, T* to) {
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) store(to + d, mul(load(from + d), set1(factor)));
  if (d < n) store_part(to + d, mul(load(from + d), set1(factor)), static_cast<int>(n - d));
}

}  // namespace fusetune::FUSETUNE_ISA
