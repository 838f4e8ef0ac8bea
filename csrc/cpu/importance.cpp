// AdaLoRA's importance of weights: two moving averages of |w dw|, element by element, and the mean of their product
// over the rows or the columns of each of many small matrices.
//
// Tiling: one matrix at a time; blocks of 1024 elements, whose products are added up in L1 where they are summed by
// columns. The order of sums depends on the matrix's shape alone, and on no number of threads.
// Bytes: 16 read and 8 written for each element, once. PyTorch, by the operator: about 120.
#include <algorithm>

#include "elementwise.h"
#include "isa_kernels.h"

namespace fusetune::FUSETUNE_ISA {

namespace {

constexpr int64_t kBlock = 1024;
constexpr int64_t kWhole = 16;  // so many rows are whole vectors with any instruction set

struct Factors {
  F beta1, rest1, beta2, rest2;
};

struct Elements {
  const float *weight, *grad;  // grad null: the averages stay
  float *sensitivity, *uncertainty;
};

// The averages' product of up to kLanes elements, after their update. Each operation rounds, as PyTorch's do.
template <class Load, class Store>
FUSETUNE_INLINE F product(const Elements& e, int64_t i, const Factors& by, const Load& read, const Store& write) {
  F s = read(e.sensitivity + i), u = read(e.uncertainty + i);
  if (!e.grad) return mul(s, u);
  const F now = abs(mul(read(e.weight + i), read(e.grad + i)));
  s = add(mul(by.beta1, s), mul(by.rest1, now));
  u = add(mul(by.beta2, u), mul(by.rest2, abs(sub(now, s))));
  write(e.sensitivity + i, s), write(e.uncertainty + i, u);
  return mul(s, u);
}

// Calls f(j, products) for n elements from `first` on, a vector at a time; the last one is filled up with zeros.
template <class Function>
FUSETUNE_INLINE void for_products(const Elements& e, int64_t first, int64_t n, const Factors& by, const Function& f) {
  int64_t j = 0;
  const auto whole = [](const float* p) { return load(p); };
  const auto put = [](float* p, F v) { store(p, v); };
  for (; j + kLanes <= n; j += kLanes) f(j, product(e, first + j, by, whole, put));
  if (j == n) return;
  const int lanes = static_cast<int>(n - j);
  const auto part = [lanes](const float* p) { return load_part(p, lanes); };
  const auto put_part = [lanes](float* p, F v) { store_part(p, v, lanes); };
  f(j, product(e, first + j, by, part, put_part));
}

// e and by: copies, which stay in registers while the averages are written.
void mean_of_rows(Elements e, int64_t rows, int64_t cols, Factors by, float* scores) {
  for (int64_t row = 0; row < rows; ++row) {
    float total = 0;
    for (int64_t col = 0; col < cols; col += kBlock) {
      F sum = zero();
      const int64_t wide = std::min(kBlock, cols - col);
      for_products(e, row * cols + col, wide, by, [&](int64_t, F v) { sum = add(sum, v); });
      total += hsum(sum);
    }
    scores[row] = total / static_cast<float>(cols);
  }
}

// Sums of `height` rows each are kept apart and added in halves at the end, all of them in whole vectors whatever the
// number of columns: in AdaLoRA's matrices it is the rank.
void mean_of_columns(Elements e, int64_t rows, int64_t cols, Factors by, float* scores) {
  alignas(64) float sums[kBlock + kLanes];
  int64_t height = kBlock / std::max<int64_t>(1, cols);
  if (height > kWhole) height -= height % kWhole;
  height = std::max<int64_t>(1, std::min(rows, height));
  for (int64_t col = 0; col < cols; col += kBlock) {  // more than once only where height is 1
    const int64_t wide = std::min(kBlock, cols - col);
    std::fill(sums, sums + height * wide + kLanes, 0.f);
    for (int64_t row = 0; row < rows; row += height) {
      const int64_t count = std::min(height, rows - row) * wide;
      for_products(e, row * cols + col, count, by, [&](int64_t j, F v) { store(sums + j, add(load(sums + j), v)); });
    }
    for (int64_t left = height, half; left > 1; left = half) {
      half = (left + 1) / 2;
      for_vectors<1>(0, (left - half) * wide, [&](int64_t j, int lanes) {
        write(sums + j, add(read(sums + j, lanes), read(sums + half * wide + j, lanes)), lanes);
      });
    }
    for (int64_t j = 0; j < wide; ++j) scores[col + j] = sums[j] / static_cast<float>(rows);
  }
}

}  // namespace

void importance(const ImportanceMatrices& all, float beta1, float rest1, float beta2, float rest2, bool by_column,
                float* scores) {
  parallel_chunks(all.count, [&](int64_t i) {
    const Factors by = {set1(beta1), set1(rest1), set1(beta2), set1(rest2)};
    const Elements e = {all.weights[i], all.grads[i], all.sensitivity[i], all.uncertainty[i]};
    const int64_t rows = all.rows[i], cols = all.cols[i];
    if (by_column) return mean_of_columns(e, rows, cols, by, scores + all.first[i]);
    if (cols == 1) return mean_of_columns(e, 1, rows, by, scores + all.first[i]);  // E: whole vectors
    mean_of_rows(e, rows, cols, by, scores + all.first[i]);
  });
}

}  // namespace fusetune::FUSETUNE_ISA
