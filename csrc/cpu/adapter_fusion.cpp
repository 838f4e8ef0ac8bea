// Attention of AdapterFusion, forward: for each of M rows, softmax over N adapters of g . values_i, and the sum of the
// values_i that it weighs.
//
// Tiling: adapter_fusion.h's. The softmax is taken as it goes, with the sum so far scaled down whenever a larger score
// turns up.
//
// Bytes (fp32): 4 M N H read for the values, 8 M H for g and the result. Arithmetic: 4 M N H flops, one per byte:
// memory's bandwidth is the floor.
#include <cfloat>

#include "adapter_fusion.h"
#include "exp.h"

namespace fusetune::FUSETUNE_ISA {

namespace {

// x *= factor
void scale(float* x, int64_t n, float factor) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(x + j, mul(load(x + j), set1(factor)));
  if (j < n) store_part(x + j, mul(load_part(x + j, static_cast<int>(n - j)), set1(factor)), static_cast<int>(n - j));
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
                   float temperature, const Dropout& dropout, int64_t dropout_row, const MutMatrix& ctx, float* p) {
  const int64_t n = values.count, block_floats = kRows * padded(h);
  const auto attend_block = [&](auto* type, int64_t first_row, int64_t rows) {
    using T = std::remove_pointer_t<decltype(type)>;
    float* buffer = workspace(2 * block_floats + padded(kRows * n));
    float* factors = buffer + 2 * block_floats;
    const Floats2d query = read_rows(g, first_row, rows, h, buffer);
    const Floats2d out = rows_to_write(ctx, first_row, h, buffer + block_floats);
    for (int64_t r = 0; r < rows; ++r) memset(out.row(r), 0, h * sizeof(float));
    if (dropout.threshold) dropout_factors(dropout, (dropout_row + first_row) * n, rows * n, factors);
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

}  // namespace fusetune::FUSETUNE_ISA
