// What both passes of AdapterFusion's attention share: rows in fp32, and the order in which adapters are gone over.
//
// Tiling: 8 rows by 4 adapters at a time. What is read of one adapter is then contiguous, so that prefetchers follow
// it, and a row's 4 values are still in L1 when they are used again, for the sum. (All N values of a row at once would
// not stay in L1 or L2: large tensors lie at multiples of 4 KB from each other, so that these N rows compete for the
// same cache sets.)
#pragma once
#include <algorithm>

#include "../parallel.h"
#include "dropout.h"
#include "float_rows.h"
#include "workspace.h"

namespace fusetune::FUSETUNE_ISA {

constexpr int kRows = 8;
constexpr int kGroup = 4;   // adapters at a time, which share the loads of g and of the sum
constexpr int kUnroll = 2;  // vectors of a row at a time
constexpr int64_t kStep = kUnroll * kLanes;

// One row of `count` adapters from `first`.
template <int count, class T>
struct Group {
  static constexpr int kCount = count;
  const T* v[count];
  Group(const FusionValues& values, int64_t first, int64_t row) {
    for (int i = 0; i < count; ++i) {
      v[i] = static_cast<const T*>(values.data[first + i]) + row * values.ld[first + i];
    }
  }

  // dots[i] = x . v[i]
  void dot(const float* x, int64_t h, float* dots) const {
    F sum[count][kUnroll];
    for (auto& s : sum) {
      for (F& part : s) part = zero();
    }
    int64_t j = 0;
    for (; j + kStep <= h; j += kStep) {
      for (int u = 0; u < kUnroll; ++u) {
        const F part = load(x + j + u * kLanes);
        for (int i = 0; i < count; ++i) sum[i][u] = fma(part, load(v[i] + j + u * kLanes), sum[i][u]);
      }
    }
    for (; j < h; j += kLanes) {
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, h - j));
      const F part = load_part(x + j, lanes);
      for (int i = 0; i < count; ++i) sum[i][0] = fma(part, load_part(v[i] + j, lanes), sum[i][0]);
    }
    for (int i = 0; i < count; ++i) dots[i] = hsum(add(sum[i][0], sum[i][1]));
  }

  // out = scale out + sum_i weights[i] v[i]
  void add_to(float scale, const float* weights, int64_t h, float* out) const {
    F weight[count];
    for (int i = 0; i < count; ++i) weight[i] = set1(weights[i]);
    const F old = set1(scale);
    int64_t j = 0;
    for (; j + kStep <= h; j += kStep) {
      for (int u = 0; u < kUnroll; ++u) {
        F sum = mul(old, load(out + j + u * kLanes));
        for (int i = 0; i < count; ++i) sum = fma(weight[i], load(v[i] + j + u * kLanes), sum);
        store(out + j + u * kLanes, sum);
      }
    }
    for (; j < h; j += kLanes) {
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, h - j));
      F sum = mul(old, load_part(out + j, lanes));
      for (int i = 0; i < count; ++i) sum = fma(weight[i], load_part(v[i] + j, lanes), sum);
      store_part(out + j, sum, lanes);
    }
  }
};

// Calls f(r, first, group) for every row r of a block and every 4 adapters, all rows of these one after the other.
template <int count, class T, class Function>
static void for_group(const FusionValues& values, int64_t first, int64_t first_row, int64_t rows, const Function& f) {
  for (int64_t r = 0; r < rows; ++r) f(r, first, Group<count, T>(values, first, first_row + r));
}
template <class T, class Function>
static void for_groups(const FusionValues& values, int64_t first_row, int64_t rows, const Function& f) {
  int64_t first = 0;
  for (; first + kGroup <= values.count; first += kGroup) for_group<kGroup, T>(values, first, first_row, rows, f);
  if (values.count - first == 3) return for_group<3, T>(values, first, first_row, rows, f);
  if (values.count - first == 2) return for_group<2, T>(values, first, first_row, rows, f);
  if (values.count - first == 1) for_group<1, T>(values, first, first_row, rows, f);
}

// Calls f(first row, rows) for blocks of rows.
template <class Function>
static void for_blocks(int64_t m, const Function& f) {
  parallel_chunks((m + kRows - 1) / kRows, [&](int64_t block) {
    f(block * kRows, std::min<int64_t>(kRows, m - block * kRows));
  });
}

// What a block's scores are multiplied by, 0 for those that are dropped: `count` numbers of the matrix [M, N].
static inline void dropout_factors(const Dropout& dropout, int64_t first, int64_t count, float* factors) {
  for (int64_t i = 0; i < padded(count); ++i) factors[i] = 1;
  apply_dropout(dropout, first, count, factors);
}

}  // namespace fusetune::FUSETUNE_ISA
