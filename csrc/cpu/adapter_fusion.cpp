// Attention of AdapterFusion: for each of M rows, softmax over N adapters of g . values_i, and the sum of the values_i
// that it weighs.
//
// Tiling: 8 rows by 4 adapters at a time. What is read of one adapter is then contiguous, so that prefetchers follow
// it, and a row's 4 values are still in L1 when they are used again, for the sum: the softmax is taken as it goes, with
// the sum so far scaled down whenever a larger score turns up. (All N values of a row at once would not stay in L1 or
// L2: large tensors lie at multiples of 4 KB from each other, so that these N rows compete for the same cache sets.)
// Backward, with dp_i = dctx . values_i and delta = sum_i p_i dp_i, which is known at the end only:
//   dg = (sum_i p_i dp_i values_i - delta sum_i p_i values_i) / temperature
// takes the same single pass, and the values' gradients are written after it without reading them again. Only
// differences of the dp_i matter: they are counted from the first, so that what all have in common need not cancel.
//
// Bytes (fp32): forward 4 M N H read for the values, 8 M H for g and the result. Backward as much again, and 4 M N H
// written for the values' gradients. Arithmetic: 4 M N H flops forward and 10 M N H backward, one or two per byte:
// memory's bandwidth is the floor of both.
#include <algorithm>
#include <cfloat>

#include "../parallel.h"
#include "dropout.h"
#include "exp.h"
#include "isa_kernels.h"
#include "workspace.h"

namespace fusetune::FUSETUNE_ISA {

namespace {

constexpr int kRows = 8;
constexpr int kGroup = 4;   // adapters at a time, which share the loads of g and of the sum
constexpr int kUnroll = 2;  // vectors of a row at a time
constexpr int64_t kStep = kUnroll * kLanes;

int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// Calls f with a null pointer of the element type.
template <class Function>
void with_type(Dtype dtype, const Function& f) {
  if (dtype == Dtype::f32) return f(static_cast<float*>(nullptr));
  if (dtype == Dtype::f16) return f(static_cast<f16*>(nullptr));
  f(static_cast<bf16*>(nullptr));
}

// Rows in fp32, at `stride` from each other.
struct Floats2d {
  float* data;
  int64_t stride;
  float* row(int64_t r) const { return data + r * stride; }
};

// `rows` rows of a matrix in fp32: in place, or converted into `buffer`.
Floats2d read_rows(const Matrix& m, int64_t first, int64_t rows, int64_t n, float* buffer) {
  if (m.dtype == Dtype::f32) return {const_cast<float*>(static_cast<const float*>(m.data)) + first * m.ld, m.ld};
  const Floats2d out{buffer, padded(n)};
  with_type(m.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t r = 0; r < rows; ++r) {
      const T* x = static_cast<const T*>(m.data) + (first + r) * m.ld;
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) store(out.row(r) + i, load(x + i));
      if (i < n) store(out.row(r) + i, load_part(x + i, static_cast<int>(n - i)));
    }
  });
  return out;
}

// Where to write rows in fp32: in place, or to `buffer`, from which write_rows then converts them.
Floats2d rows_to_write(const MutMatrix& m, int64_t first, int64_t n, float* buffer) {
  if (m.dtype != Dtype::f32) return {buffer, padded(n)};
  return {static_cast<float*>(m.data) + first * m.ld, m.ld};
}

void write_rows(const MutMatrix& m, int64_t first, int64_t rows, int64_t n, const Floats2d& from) {
  if (m.dtype == Dtype::f32) return;
  with_type(m.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t r = 0; r < rows; ++r) {
      T* y = static_cast<T*>(m.data) + (first + r) * m.ld;
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) store(y + i, load(from.row(r) + i));
      if (i < n) store_part(y + i, load(from.row(r) + i), static_cast<int>(n - i));
    }
  });
}

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

// out = a x + b y
template <class T>
void combine(float a, const float* x, float b, const float* y, int64_t n, T* out) {
  const F left = set1(a), right = set1(b);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(out + j, fma(left, load(x + j), mul(right, load(y + j))));
  if (j == n) return;
  const int lanes = static_cast<int>(n - j);
  store_part(out + j, fma(left, load_part(x + j, lanes), mul(right, load_part(y + j, lanes))), lanes);
}

// x *= factor
void scale(float* x, int64_t n, float factor) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(x + j, mul(load(x + j), set1(factor)));
  if (j < n) store_part(x + j, mul(load_part(x + j, static_cast<int>(n - j)), set1(factor)), static_cast<int>(n - j));
}

// Calls f(r, first, group) for every row r of a block and every 4 adapters, all rows of these one after the other.
template <int count, class T, class Function>
void for_group(const FusionValues& values, int64_t first, int64_t first_row, int64_t rows, const Function& f) {
  for (int64_t r = 0; r < rows; ++r) f(r, first, Group<count, T>(values, first, first_row + r));
}
template <class T, class Function>
void for_groups(const FusionValues& values, int64_t first_row, int64_t rows, const Function& f) {
  int64_t first = 0;
  for (; first + kGroup <= values.count; first += kGroup) for_group<kGroup, T>(values, first, first_row, rows, f);
  if (values.count - first == 3) return for_group<3, T>(values, first, first_row, rows, f);
  if (values.count - first == 2) return for_group<2, T>(values, first, first_row, rows, f);
  if (values.count - first == 1) for_group<1, T>(values, first, first_row, rows, f);
}

// Calls f(first row, rows) for blocks of rows.
template <class Function>
void for_blocks(int64_t m, const Function& f) {
  parallel_chunks((m + kRows - 1) / kRows, [&](int64_t block) {
    f(block * kRows, std::min<int64_t>(kRows, m - block * kRows));
  });
}

// What a block's scores are multiplied by, 0 for those that are dropped: `count` numbers of the matrix [M, N].
void dropout_factors(const Dropout& dropout, int64_t first, int64_t count, float* factors) {
  for (int64_t i = 0; i < padded(count); ++i) factors[i] = 1;
  apply_dropout(dropout, first, count, factors);
}

// Zero also where it is not finite.
float dropped_out(float score, float factor) { return factor == 0 ? 0 : score * factor; }

// The softmax of a row as it goes.
struct Softmax {
  float top = -FLT_MAX, sum = 0;

  // Takes in `count` scores: gives their weights relative to the largest score yet, and the factor of former ones.
  template <int count>
  float take(const float* scores, float* weights) {
    alignas(64) float x[16] = {};
    float largest = top;
    for (int i = 0; i < count; ++i) largest = std::max(largest, scores[i]);
    for (int i = 0; i < count; ++i) x[i] = scores[i] - largest;
    x[count] = top - largest;
    for (int i = 0; i <= count; i += kLanes) store(x + i, exp_nonpositive(load(x + i)));
    top = largest;
    sum *= x[count];
    for (int i = 0; i < count; ++i) sum += weights[i] = x[i];
    return x[count];
  }

  // scores -> probabilities, in place
  void finish(float* scores, int64_t n) const {
    for (int64_t i = 0; i < n; i += kLanes) {
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, n - i));
      const F e = exp_nonpositive(sub(load_part(scores + i, lanes), set1(top)));
      store_part(scores + i, div(e, set1(sum)), lanes);
    }
  }
};

}  // namespace

void fusion_attend(const Matrix& g, int64_t m, int64_t h, const FusionValues& values, const float* offset,
                   float temperature, const Dropout& dropout, const MutMatrix& ctx, float* p) {
  const int64_t n = values.count, block_floats = kRows * padded(h);
  const auto attend_block = [&](auto* type, int64_t first_row, int64_t rows) {
    using T = std::remove_pointer_t<decltype(type)>;
    float* buffer = workspace(2 * block_floats + padded(kRows * n));
    float* factors = buffer + 2 * block_floats;
    const Floats2d query = read_rows(g, first_row, rows, h, buffer);
    const Floats2d out = rows_to_write(ctx, first_row, h, buffer + block_floats);
    for (int64_t r = 0; r < rows; ++r) memset(out.row(r), 0, h * sizeof(float));
    if (dropout.threshold) dropout_factors(dropout, first_row * n, rows * n, factors);
    Softmax softmax[kRows];
    for_groups<T>(values, first_row, rows, [&](int64_t r, int64_t first, const auto& group) {
      float* scores = p + (first_row + r) * n + first;
      group.dot(query.row(r), h, scores);
      for (int i = 0; i < group.kCount; ++i) {
        if (offset) scores[i] += offset[first_row + r];
        if (dropout.threshold) scores[i] = dropped_out(scores[i], factors[r * n + first + i]);
        scores[i] /= temperature;
      }
      float weights[group.kCount];
      const float old = softmax[r].template take<group.kCount>(scores, weights);
      group.add_to(old, weights, h, out.row(r));
    });
    for (int64_t r = 0; r < rows; ++r) {
      softmax[r].finish(p + (first_row + r) * n, n);
      scale(out.row(r), h, 1 / softmax[r].sum);
    }
    write_rows(ctx, first_row, rows, h, out);
  };
  with_type(values.dtype, [&](auto* type) {
    for_blocks(m, [&](int64_t first_row, int64_t rows) { attend_block(type, first_row, rows); });
  });
}

void fusion_attend_backward(const Matrix& dctx, const Matrix& g, int64_t m, int64_t h, const FusionValues& values,
                            const float* p, float temperature, const Dropout& dropout, const MutMatrix& dg,
                            void* const* dvalues, float* doffset) {
  const int64_t n = values.count, block_floats = kRows * padded(h);
  const auto block_backward = [&](auto* type, int64_t first_row, int64_t rows) {
    using T = std::remove_pointer_t<decltype(type)>;
    float* buffer = workspace(4 * block_floats + 2 * padded(kRows * n));
    float* factors = buffer + 4 * block_floats;
    float* ds = factors + padded(kRows * n);
    const Floats2d upper = read_rows(dctx, first_row, rows, h, buffer);
    const Floats2d out = rows_to_write(dg, first_row, h, buffer + block_floats);
    const Floats2d mean{buffer + 2 * block_floats, padded(h)};  // sum_i p_i values_i, after dropout
    for (int64_t r = 0; r < rows; ++r) {
      memset(out.row(r), 0, h * sizeof(float));
      memset(mean.row(r), 0, h * sizeof(float));
    }
    dropout_factors(dropout, first_row * n, rows * n, factors);
    float base[kRows], delta[kRows] = {};
    for_groups<T>(values, first_row, rows, [&](int64_t r, int64_t first, const auto& group) {
      float* dp = ds + r * n + first;
      float weights[group.kCount], kept[group.kCount];
      group.dot(upper.row(r), h, dp);
      if (first == 0) base[r] = dp[0];
      for (int i = 0; i < group.kCount; ++i) {
        dp[i] -= base[r];
        const float weight = p[(first_row + r) * n + first + i];
        delta[r] += weight * dp[i];
        kept[i] = weight * factors[r * n + first + i];
        weights[i] = kept[i] * dp[i];
      }
      group.add_to(1, weights, h, out.row(r));
      group.add_to(1, kept, h, mean.row(r));
    });
    for (int64_t r = 0; r < rows; ++r) {
      combine(1 / temperature, out.row(r), -delta[r] / temperature, mean.row(r), h, out.row(r));
      float total = 0;
      for (int64_t i = r * n; i < (r + 1) * n; ++i) {
        ds[i] = factors[i] * p[first_row * n + i] * (ds[i] - delta[r]) / temperature;
        total += ds[i];
      }
      doffset[first_row + r] = total;
    }
    write_rows(dg, first_row, rows, h, out);
    if (!dvalues) return;
    const Floats2d query = read_rows(g, first_row, rows, h, buffer + 3 * block_floats);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t r = 0; r < rows; ++r) {
        T* out_row = static_cast<T*>(dvalues[i]) + (first_row + r) * h;
        combine(p[(first_row + r) * n + i], upper.row(r), ds[r * n + i], query.row(r), h, out_row);
      }
    }
  };
  with_type(values.dtype, [&](auto* type) {
    for_blocks(m, [&](int64_t first_row, int64_t rows) { block_backward(type, first_row, rows); });
  });
}

}  // namespace fusetune::FUSETUNE_ISA
