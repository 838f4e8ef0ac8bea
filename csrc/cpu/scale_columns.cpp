// y = l x + b by columns, all [M, N], and its gradients: dx = l dy, dl = sum over rows of dy x, db = sum over rows of
// dy. What IA3 does to a layer's output or input, and the gradient of any bias.
//
// Tiling: kRows rows of at most kCols columns at a time. Their sums stay in the L1 cache, four rows are added to them
// at a time; the chunks' sums are then added in the order of their rows: at once where one thread has all rows of its
// columns, otherwise out of memory. So every sum is the same however many threads take part, and its rounding error
// grows with kRows / 4 + M / kRows, not with M.
// Bytes: each operand and result once; with several threads, 8 N / kRows a row for the sums. PyTorch, by the operator,
// writes and reads the product dy x, and for 16 bits an fp32 copy of what it sums.
#include <algorithm>

#include "elementwise.h"
#include "isa_kernels.h"
#include "workspace.h"

namespace fusetune::FUSETUNE_ISA {

namespace {

constexpr int64_t kRows = 128;  // whose sums are taken together
constexpr int64_t kCols = 2048;
constexpr int64_t kStep = 4;       // rows added to the sums at a time
constexpr int64_t kAlone = 32768;  // elements that are summed in less time than a thread takes to wake

// Calls f(first row, end row, first column, end column, number of the chunk of `rows` rows).
template <class Function>
void for_blocks(int64_t m, int64_t n, int64_t rows, const Function& f) {
  const int64_t across = (n + kCols - 1) / kCols;
  parallel_chunks((m + rows - 1) / rows * across, [&](int64_t task) {
    const int64_t row = task / across * rows, col = task % across * kCols;
    f(row, std::min(m, row + rows), col, std::min(n, col + kCols), task / across);
  });
}

// Columns of a task that takes all rows.
int64_t width_of_task(int64_t m, int64_t n) {
  if (m * n <= kAlone) return std::max<int64_t>(n, 1);
  const int64_t line = 16, share = (n / num_threads() + line - 1) / line * line;
  return std::min(kCols, std::max<int64_t>(512, share));
}

struct Sums {
  float *scale, *bias;  // [N] each, null where not needed
};

// Adds `count` rows from `row` on to the sums, and writes their dx. Flags, known to the compiler: what is needed.
template <int count, class T, bool with_scale, bool with_bias, bool with_dx>
FUSETUNE_INLINE void add_rows(const Matrix& dy, const Matrix& x, int64_t row, int64_t begin, int64_t end,
                              const float* scale, const MutMatrix& dx, const Sums& sums) {
  // Variables of its own, not members: those would be read again after each store.
  const int64_t dy_ld = dy.ld, x_ld = x.ld, dx_ld = dx.ld;
  float *const scale_sums = sums.scale, *const bias_sums = sums.bias;
  const T* const dy_rows = static_cast<const T*>(dy.data) + row * dy_ld;
  const T* const x_rows = with_scale ? static_cast<const T*>(x.data) + row * x_ld : nullptr;
  T* const dx_rows = with_dx ? static_cast<T*>(dx.data) + row * dx_ld : nullptr;
  for_vectors<1>(begin, end, [=](int64_t i, int lanes) {
    F product = zero(), sum = zero();
    const F factor = with_dx ? read(scale + i, lanes) : zero();
    for (int r = 0; r < count; ++r) {
      const F upper = read(dy_rows + r * dy_ld + i, lanes);
      if (with_scale) product = fma(upper, read(x_rows + r * x_ld + i, lanes), product);
      if (with_bias) sum = add(sum, upper);
      if (with_dx) write(dx_rows + r * dx_ld + i, mul(factor, upper), lanes);
    }
    if (with_scale) write(scale_sums + i, add(read(scale_sums + i, lanes), product), lanes);
    if (with_bias) write(bias_sums + i, add(read(bias_sums + i, lanes), sum), lanes);
  });
}

// Calls f with std::true_type or std::false_type.
template <class Function>
void with_flag(bool flag, const Function& f) {
  if (flag) return f(std::true_type{});
  f(std::false_type{});
}

template <class T>
void add_block(const Matrix& dy, const Matrix& x, int64_t row, int64_t last, int64_t begin, int64_t end,
               const float* scale, const MutMatrix& dx, const Sums& sums) {
  for (float* sum : {sums.scale, sums.bias}) {
    if (sum) std::fill(sum + begin, sum + end, 0.f);
  }
  with_flag(sums.scale, [&](auto with_scale) {
    with_flag(sums.bias, [&](auto with_bias) {
      with_flag(dx.data, [&](auto with_dx) {
        constexpr bool s = decltype(with_scale)::value, b = decltype(with_bias)::value, d = decltype(with_dx)::value;
        int64_t r = row;
        for (; r + kStep <= last; r += kStep) add_rows<kStep, T, s, b, d>(dy, x, r, begin, end, scale, dx, sums);
        for (; r < last; ++r) add_rows<1, T, s, b, d>(dy, x, r, begin, end, scale, dx, sums);
      });
    });
  });
}

void add_to(float* sums, const float* more, int64_t begin, int64_t end) {
  if (!sums) return;
  for_vectors<1>(begin, end, [sums, more](int64_t i, int lanes) {
    write(sums + i, add(read(sums + i, lanes), read(more + i, lanes)), lanes);
  });
}

// out [N] = the sum of parts [count, N], from the first to the last.
void add_parts(const float* parts, int64_t count, int64_t n, float* out) {
  if (!out) return;
  parallel_chunks((n + kCols - 1) / kCols, [&](int64_t chunk) {
    const int64_t begin = chunk * kCols, end = std::min(n, begin + kCols);
    std::fill(out + begin, out + end, 0.f);
    for (int64_t part = 0; part < count; ++part) add_to(out, parts + part * n, begin, end);
  });
}

// Sums of all rows of [begin, end), and their dx. next: memory for the sums of a chunk, as `sums`.
template <class T>
void add_columns(const Matrix& dy, const Matrix& x, int64_t m, int64_t begin, int64_t end, const float* scale,
                 const MutMatrix& dx, const Sums& sums, const Sums& next) {
  add_block<T>(dy, x, 0, std::min(m, kRows), begin, end, scale, dx, sums);
  for (int64_t row = kRows; row < m; row += kRows) {
    add_block<T>(dy, x, row, std::min(m, row + kRows), begin, end, scale, dx, next);
    add_to(sums.scale, next.scale, begin, end);
    add_to(sums.bias, next.bias, begin, end);
  }
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
    for_blocks(m, n, kRows / 2, [&](int64_t row, int64_t last, int64_t begin, int64_t end, int64_t) {
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
  const bool by_columns = m <= kRows || m * n <= kAlone || num_threads() == 1;
  const int64_t parts = by_columns ? 1 : (m + kRows - 1) / kRows;
  float* const memory = workspace<Purpose::shared>(2 * parts * n);
  const Sums sums{dscale, dbias}, all_parts{dscale ? memory : nullptr, dbias ? memory + parts * n : nullptr};
  with_type(dy.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (by_columns) {
      const int64_t width = width_of_task(m, n);
      return parallel_chunks((n + width - 1) / width, [&](int64_t task) {
        const int64_t begin = task * width, end = std::min(n, begin + width);
        add_columns<T>(dy, x, m, begin, end, scale, dx, sums, all_parts);
      });
    }
    for_blocks(m, n, kRows, [&](int64_t row, int64_t last, int64_t begin, int64_t end, int64_t part) {
      const Sums own{dscale ? all_parts.scale + part * n : nullptr, dbias ? all_parts.bias + part * n : nullptr};
      add_block<T>(dy, x, row, last, begin, end, scale, dx, own);
    });
  });
  if (by_columns) return;
  add_parts(all_parts.scale, parts, n, dscale);
  add_parts(all_parts.bias, parts, n, dbias);
}

}  // namespace fusetune::FUSETUNE_ISA
