// y = weight * x * rstd with rstd = 1 / sqrt(mean(x^2) + eps), and the gradient of x; all [M, N] but weight [N].
//
// Tiling: rows in chunks of about 16 Ki elements, each read twice, the second time from L1 or L2.
// Bytes for fp32: forward 4 M N read and 4 M N written, backward 8 M N read and 4 M N written. PyTorch, by the
// operator: forward 24 and 12, and keeps two more of x's size between the passes; backward some 48 and 24.
#include <algorithm>
#include <cmath>

#include "elementwise.h"
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

}  // namespace

void rms_norm(const Matrix& x, int64_t m, int64_t n, const float* weight, float eps, float* y, float* rstd) {
  for_rows_of(m, n, [&](int64_t r) {
    const float* const row = static_cast<const float*>(x.data) + r * x.ld;
    const float squares = sum_over(n, [&](int64_t i, int lanes, F sum) {
      const F v = read(row + i, lanes);
      return fma(v, v, sum);
    });
    rstd[r] = 1.f / std::sqrt(squares / static_cast<float>(n) + eps);
    const F scale = set1(rstd[r]);
    for_vectors<2>(0, n, [&](int64_t i, int lanes) {
      write(y + r * n + i, mul(read(weight + i, lanes), mul(read(row + i, lanes), scale)), lanes);
    });
  });
}

void rms_norm_dx(const Matrix& dy, const Matrix& x, int64_t m, int64_t n, const float* weight, const float* rstd,
                 float* dx) {
  for_rows_of(m, n, [&](int64_t r) {
    const float* const upper = static_cast<const float*>(dy.data) + r * dy.ld;
    const float* const row = static_cast<const float*>(x.data) + r * x.ld;
    const float along = sum_over(n, [&](int64_t i, int lanes, F sum) {
      return fma(mul(read(upper + i, lanes), read(weight + i, lanes)), read(row + i, lanes), sum);
    });
    const F scale = set1(rstd[r]), factor = set1(-along / static_cast<float>(n) * rstd[r] * rstd[r]);
    for_vectors<2>(0, n, [&](int64_t i, int lanes) {
      const F own = mul(read(upper + i, lanes), read(weight + i, lanes));
      write(dx + r * n + i, mul(fma(read(row + i, lanes), factor, own), scale), lanes);
    });
  });
}

}  // namespace fusetune::FUSETUNE_ISA
