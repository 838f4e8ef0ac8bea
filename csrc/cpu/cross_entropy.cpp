// Cross-entropy over a vocabulary: logits [M, V] and a target per row.
//
// Tiling: a row at a time (192 KB of fp32 at V = 49152: it stays in L2 between the passes over it), rows handed out
// in chunks of at least 16 Ki elements. Rows that are ignored are not read.
// Bytes: forward 4 M V read from memory (the second pass, for the sum of exponentials, comes from L2), 8 M written.
// Backward 4 M V read and 4 M V written, in place where nobody else reads the logits. PyTorch: forward 4 M V read and
// written, backward another 5 times 4 M V, and two more tensors of that size.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "elementwise.h"
#include "exp.h"
#include "isa_kernels.h"

namespace fusetune::FUSETUNE_ISA {

namespace {

constexpr int kUnroll = 4;                        // vectors at a time: hides the latency of exp's chain
constexpr int64_t kStep = kUnroll * kLanes;
constexpr int64_t kBlock = 1024 / kStep * kStep;  // elements summed in fp32 before the sum goes to double

template <class T>
float row_max(const T* x, int64_t n) {
  F top[kUnroll];
  for (F& t : top) t = set1(-INFINITY);
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (int u = 0; u < kUnroll; ++u) top[u] = max(top[u], load(x + i + u * kLanes));
  }
  float result = hmax(max(max(top[0], top[1]), max(top[2], top[3])));
  for (; i < n; ++i) result = std::max(result, to_float(x[i]));
  return result;
}

// sum of f(x) over a row: vectors in blocks of fp32, blocks in double.
template <class T, class Vector>
double row_sum(const T* x, int64_t n, const Vector& f) {
  double total = 0;
  int64_t i = 0;
  while (i + kStep <= n) {
    const int64_t end = std::min(n / kStep * kStep, i + kBlock);
    F sum[kUnroll] = {zero(), zero(), zero(), zero()};
    for (; i < end; i += kStep) {
      for (int u = 0; u < kUnroll; ++u) sum[u] = add(sum[u], f(load(x + i + u * kLanes)));
    }
    total += hsum(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
  }
  for (; i < n; i += kLanes) {
    alignas(64) float tail[kLanes];
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, n - i));
    store(tail, f(load_part(x + i, lanes)));
    for (int lane = 0; lane < lanes; ++lane) total += tail[lane];
  }
  return total;
}

template <class T>
void forward_row(const T* x, int64_t v, int64_t target, float smoothing, float& loss, float& lse) {
  const float top = row_max(x, v);
  const double sum = row_sum(x, v, [&](F value) { return exp_nonpositive(sub(value, set1(top))); });
  const double log_sum = top + std::log(sum);
  double picked = to_float(x[target]);
  if (smoothing != 0) picked += smoothing * (row_sum(x, v, [](F value) { return value; }) / v - picked);
  lse = static_cast<float>(log_sum);
  loss = static_cast<float>(log_sum - picked);
}

// dx may be x: every element is read before it is written.
template <class T>
void backward_row(const T* x, int64_t v, int64_t target, float smoothing, float lse, float dloss, T* dx) {
  const float even = smoothing / static_cast<float>(v);
  const F log_sum = set1(lse), scale = set1(dloss), shift = set1(-even);
  const auto gradient = [&](F value) { return mul(add(exp_nonpositive(sub(value, log_sum)), shift), scale); };
  // expm1: near 0 for a token that is predicted well.
  const double off = std::expm1(static_cast<double>(to_float(x[target])) - lse);
  int64_t i = 0;
  for (; i + kStep <= v; i += kStep) {
    for (int u = 0; u < kUnroll; ++u) store(dx + i + u * kLanes, gradient(load(x + i + u * kLanes)));
  }
  for (; i < v; i += kLanes) {
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, v - i));
    store_part(dx + i, gradient(load_part(x + i, lanes)), lanes);
  }
  from_float(static_cast<float>((off + smoothing - even) * dloss), dx[target]);
}

// Calls f with a null pointer of the element type.
template <class Function>
void with_type(Dtype dtype, const Function& f) {
  if (dtype == Dtype::f32) return f(static_cast<float*>(nullptr));
  if (dtype == Dtype::f16) return f(static_cast<f16*>(nullptr));
  f(static_cast<bf16*>(nullptr));
}

}  // namespace

int64_t cross_entropy(const Matrix& logits, int64_t m, int64_t v, const int64_t* target, int64_t ignore_index,
                      float smoothing, float* loss, float* lse) {
  for (int64_t row = 0; row < m; ++row) {
    if (target[row] != ignore_index && (target[row] < 0 || target[row] >= v)) return row;
  }
  with_type(logits.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows_of(m, v, [&](int64_t row) {
      loss[row] = lse[row] = 0;
      if (target[row] == ignore_index) return;
      const T* x = static_cast<const T*>(logits.data) + row * logits.ld;
      forward_row(x, v, target[row], smoothing, loss[row], lse[row]);
    });
  });
  return -1;
}

void cross_entropy_backward(const Matrix& logits, int64_t m, int64_t v, const int64_t* target, int64_t ignore_index,
                            float smoothing, const float* lse, const float* dloss, const MutMatrix& dlogits) {
  with_type(logits.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows_of(m, v, [&](int64_t row) {
      const T* x = static_cast<const T*>(logits.data) + row * logits.ld;
      T* dx = static_cast<T*>(dlogits.data) + row * dlogits.ld;
      if (target[row] == ignore_index) {
        memset(dx, 0, v * sizeof(T));
        return;
      }
      backward_row(x, v, target[row], smoothing, lse[row], dloss[row], dx);
    });
  });
}

}  // namespace fusetune::FUSETUNE_ISA
