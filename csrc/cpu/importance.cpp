// AdaLoRA's importance of weights: two moving averages of |w dw|, element by element, and the mean of their product
// over the rows or the columns of each of many small matrices.
//
// Tiling: one matrix at a time; blocks of 1024 elements, whose products pass through a buffer in L1 where they are
// summed by columns. Sums are taken in the order of the elements, so they depend on no number of threads.
// Bytes: 16 read and 8 written for each element, once. PyTorch, by the operator: about 120.
#include <algorithm>

#include "../parallel.h"
#include "isa/isa.h"
#include "isa_kernels.h"

namespace fusetune::FUSETUNE_ISA {

namespace {

constexpr int64_t kBlock = 1024;

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

void mean_of_rows(const Elements& e, int64_t rows, int64_t cols, const Factors& by, float* scores) {
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

void mean_of_columns(const Elements& e, int64_t rows, int64_t cols, const Factors& by, float* scores) {
  alignas(64) float buffer[kBlock + kLanes], part[kBlock];
  const int64_t width = std::min(cols, kBlock), height = std::max<int64_t>(1, kBlock / std::max<int64_t>(1, cols));
  std::fill(scores, scores + cols, 0.f);
  for (int64_t row = 0; row < rows; row += height) {
    const int64_t high = std::min(height, rows - row);
    for (int64_t col = 0; col < cols; col += width) {
      const int64_t wide = std::min(width, cols - col);  // less than all columns only where high is 1
      for_products(e, row * cols + col, high * wide, by, [&](int64_t j, F v) { store(buffer + j, v); });
      std::fill(part, part + wide, 0.f);
      for (int64_t i = 0; i < high; ++i) {
        for (int64_t j = 0; j < wide; ++j) part[j] += buffer[i * wide + j];
      }
      for (int64_t j = 0; j < wide; ++j) scores[col + j] += part[j];
    }
  }
  for (int64_t j = 0; j < cols; ++j) scores[j] /= static_cast<float>(rows);
}

}  // namespace

void importance(const ImportanceMatrices& all, float beta1, float rest1, float beta2, float rest2, bool by_column,
                float* scores) {
  parallel_chunks(all.count, [&](int64_t i) {
    const Factors by = {set1(beta1), set1(rest1), set1(beta2), set1(rest2)};
    const Elements e = {all.weights[i], all.grads[i], all.sensitivity[i], all.uncertainty[i]};
    const auto mean = by_column ? mean_of_columns : mean_of_rows;
    mean(e, all.rows[i], all.cols[i], by, scores + all.first[i]);
  });
}

}  // namespace fusetune::FUSETUNE_ISA
