// y = l x + b by columns, all [M, N], and its gradients: dx = l dy, dl = sum over rows of dy x, db = sum over rows of
// dy. What IA3 does to a layer's output or input, and the gradient of any bias.
//
// Tiling: kRows rows of kCols columns to a task. The sums of a task stay in the L1 cache, four rows are added to them at
// a time; the tasks' sums are then added in the order of their rows. So every sum is the same however many threads take
// part, and its rounding error grows with kRows / 4 + M / kRows, not with M.
// Bytes: each operand and result once, and 8 N / kRows a row for the sums. PyTorch, by the operator, writes and reads
// the product dy x, and for 16 bits an fp32 copy of what it sums.
#include <algorithm>

#include "elementwise.h"
#include "isa_kernels.h"
#include "workspace.h"

namespace fusetune::FUSETUNE_ISA {

namespace {

constexpr int64_t kRows = 64;
constexpr int64_t kCols = 2048;
constexpr int64_t kStep = 4;  // rows added to the sums at a time

// Calls f(first row, end row, first column, end column, number of the chunk of rows).
template <class Function>
void for_blocks(int64_t m, int64_t n, const Function& f) {
  const int64_t across = (n + kCols - 1) / kCols;
  parallel_chunks((m + kRows - 1) / kRows * across, [&](int64_t task) {
    const int64_t row = task / across * kRows, col = task % across * kCols;
    f(row, std::min(m, row + kRows), col, std::min(n, col + kCols), task / across);
  });
}

struct Sums {
  float *scale, *bias;  // [N] each, null where not needed
};

// Adds `count` rows from `row` on to the sums, and writes their dx.
template <int count, class T>
FUSETUNE_INLINE void add_rows(const Matrix& dy, const Matrix& x, int64_t row, int64_t begin, int64_t end,
                              const float* scale, const MutMatrix& dx, const Sums& sums) {
  const T* const dy_rows = static_cast<const T*>(dy.data) + row * dy.ld;
  const T* const x_rows = sums.scale ? static_cast<const T*>(x.data) + row * x.ld : nullptr;
  T* const dx_rows = dx.data ? static_cast<T*>(dx.data) + row * dx.ld : nullptr;
  for_vectors<1>(begin, end, [&](int64_t i, int lanes) {
    F product = zero(), sum = zero();
    const F factor = dx_rows ? read(scale + i, lanes) : zero();
    for (int r = 0; r < count; ++r) {
      const F upper = read(dy_rows + r * dy.ld + i, lanes);
      if (x_rows) product = fma(upper, read(x_rows + r * x.ld + i, lanes), product);
      sum = add(sum, upper);
      if (dx_rows) write(dx_rows + r * dx.ld + i, mul(factor, upper), lanes);
    }
    if (sums.scale) write(sums.scale + i, add(read(sums.scale + i, lanes), product), lanes);
    if (sums.bias) write(sums.bias + i, add(read(sums.bias + i, lanes), sum), lanes);
  });
}

template <class T>
void add_block(const Matrix& dy, const Matrix& x, int64_t row, int64_t last, int64_t begin, int64_t end,
               const float* scale, const MutMatrix& dx, const Sums& sums) {
  for (float* sum : {sums.scale, sums.bias}) {
    if (sum) std::fill(sum + begin, sum + end, 0.f);
  }
  for (; row + kStep <= last; row += kStep) add_rows<kStep, T>(dy, x, row, begin, end, scale, dx, sums);
  for (; row < last; ++row) add_rows<1, T>(dy, x, row, begin, end, scale, dx, sums);
}

// out [N] = the sum of parts [count, N], from the first to the last.
void add_parts(const float* parts, int64_t count, int64_t n, float* out) {
  if (!out) return;
  parallel_chunks((n + kCols - 1) / kCols, [&](int64_t chunk) {
    const int64_t begin = chunk * kCols, end = std::min(n, begin + kCols);
    std::fill(out + begin, out + end, 0.f);
    for (int64_t part = 0; part < count; ++part) {
      for_vectors<1>(begin, end, [&](int64_t i, int lanes) {
        write(out + i, add(read(out + i, lanes), read(parts + part * n + i, lanes)), lanes);
      });
    }
  });
}

// Calls f with a null pointer of the element type.
template <class Function>
void with_type(Dtype dtype, const Function& f) {
  if (dtype == Dtype::f32) return f(static_cast<float*>(nullptr));
  if (dtype == Dtype::f16) return f(static_cast<f16*>(nullptr));
  f(static_cast<bf16*>(nullptr));
}

}  // namespace

void scale_columns(const Matrix& x, int64_t m, int64_t n, const float* scale, const float* bias, const MutMatrix& y) {
  with_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_blocks(m, n, [&](int64_t row, int64_t last, int64_t begin, int64_t end, int64_t) {
      for (; row < last; ++row) {
        const T* const from = static_cast<const T*>(x.data) + row * x.ld;
        T* const to = static_cast<T*>(y.data) + row * y.ld;
        for_vectors<1>(begin, end, [&](int64_t i, int lanes) {
          const F offset = bias ? read(bias + i, lanes) : zero();
          write(to + i, fma(read(scale + i, lanes), read(from + i, lanes), offset), lanes);
        });
      }
    });
  });
}

void scale_columns_backward(const Matrix& dy, const Matrix& x, int64_t m, int64_t n, const float* scale,
                            const MutMatrix& dx, float* dscale, float* dbias) {
  const int64_t parts = (m + kRows - 1) / kRows;
  const bool direct = parts == 1;
  const int64_t needed = direct ? 0 : parts * n * ((dscale != nullptr) + (dbias != nullptr));
  float* const memory = needed ? workspace<Purpose::shared>(needed) : nullptr;
  float* const scale_parts = dscale ? (direct ? dscale : memory) : nullptr;
  float* const bias_parts = dbias ? (direct ? dbias : memory + (dscale ? parts * n : 0)) : nullptr;
  with_type(dy.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_blocks(m, n, [&](int64_t row, int64_t last, int64_t begin, int64_t end, int64_t part) {
      const Sums own{scale_parts ? scale_parts + part * n : nullptr, bias_parts ? bias_parts + part * n : nullptr};
      add_block<T>(dy, x, row, last, begin, end, scale, dx, own);
    });
  });
  if (direct) return;
  add_parts(scale_parts, parts, n, dscale);
  add_parts(bias_parts, parts, n, dbias);
}

}  // namespace fusetune::FUSETUNE_ISA
