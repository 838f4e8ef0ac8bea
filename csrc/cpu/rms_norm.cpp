// y = weight * x * rstd with rstd = 1 / sqrt(mean(x^2) + eps), and the gradient of x; all [M, N] but weight [N].
//
// Tiling: rows in chunks of about 16 Ki elements, each read twice, the second time from L1 or L2.
// Bytes, of s an element: forward M N s read and as many written, backward 2 M N s read and M N s written. PyTorch, by
// the operator, in fp32: forward 24 M N and 12, and keeps two more of x's size between the passes; backward some 48 and
// 24.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "elementwise.h"
#include "float_rows.h"
#include "isa_kernels.h"

namespace fusetune::FUSETUNE_ISA {

namespace {

constexpr int kSums = 4;  // at a time: hides the latency of FMAs

// The sum over i of f(i, lanes), vectors; lanes is kLanes but for the last one.
template <class Function>
FUSETUNE_INLINE float sum_over(int64_t n, const Function& f) {
  F sums[kSums];
  for (F& s : sums) s = zero();
  int64_t i = 0;
  for (; i + kSums * kLanes <= n; i += kSums * kLanes) {
    for (int u = 0; u < kSums; ++u) sums[u] = f(i + u * kLanes, kLanes, sums[u]);
  }
  for (; i < n; i += kLanes) sums[0] = f(i, static_cast<int>(std::min<int64_t>(kLanes, n - i)), sums[0]);
  return hsum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

template <class T>
void normed(const T* x, int64_t n, const float* weight, float eps, T* y, float& rstd) {
  const float squares = sum_over(n, [&](int64_t i, int lanes, F sum) {
    const F v = read(x + i, lanes);
    return fma(v, v, sum);
  });
  rstd = 1.f / std::sqrt(squares / static_cast<float>(n) + eps);
  const F scale = set1(rstd);
  for_vectors<2>(0, n, [&](int64_t i, int lanes) {
    write(y + i, mul(read(weight + i, lanes), mul(read(x + i, lanes), scale)), lanes);
  });
}

template <class T>
void normed_dx(const T* dy, const T* x, int64_t n, const float* weight, float rstd, T* dx) {
  const float along = sum_over(n, [&](int64_t i, int lanes, F sum) {
    return fma(mul(read(dy + i, lanes), read(weight + i, lanes)), read(x + i, lanes), sum);
  });
  const F scale = set1(rstd), factor = set1(-along / static_cast<float>(n) * rstd * rstd);
  for_vectors<2>(0, n, [&](int64_t i, int lanes) {
    const F own = mul(read(dy + i, lanes), read(weight + i, lanes));
    write(dx + i, mul(fma(read(x + i, lanes), factor, own), scale), lanes);
  });
}

}  // namespace

void rms_norm(const Matrix& x, int64_t m, int64_t n, const float* weight, float eps, const MutMatrix& y, float* rstd) {
  for_rows_of(m, n, [&](int64_t r) {
    with_type(x.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      normed(static_cast<const T*>(x.data) + r * x.ld, n, weight, eps, static_cast<T*>(y.data) + r * y.ld, rstd[r]);
    });
  });
}

void rms_norm_dx(const Matrix& dy, const Matrix& x, int64_t m, int64_t n, const float* weight, const float* rstd,
                 const MutMatrix& dx) {
  for_rows_of(m, n, [&](int64_t r) {
    with_type(x.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      normed_dx(static_cast<const T*>(dy.data) + r * dy.ld, static_cast<const T*>(x.data) + r * x.ld, n, weight,
                rstd[r], static_cast<T*>(dx.data) + r * dx.ld);
    });
  });
}

}  // namespace fusetune::FUSETUNE_ISA
