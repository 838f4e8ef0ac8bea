// Attention of AdapterFusion, backward: the gradients of g, of the values and of the offset.
//
// Tiling: adapter_fusion.h's. With dp_i = dctx . values_i and delta = sum_i p_i dp_i, which is known at the end only,
//   dg = (sum_i p_i dp_i values_i - delta sum_i p_i values_i) / temperature
// takes the same single pass as forward, and the values' gradients are written after it without reading them again.
// Only differences of the dp_i matter: they are counted from the first, so that what all have in common need not
// cancel. sum_i p_i values_i is forward's result: who did not keep it gets it for the writing, and with dropout, whose
// mask it is without, for one more sum in the same pass.
//
// Bytes (fp32): 4 M N H read for the values, 12 M H for g, dctx and dg, and 4 M N H written for the values' gradients;
// 4 M H for forward's result.
// Arithmetic: 10 M N H flops, one or two per byte: memory's bandwidth is the floor.
#include "adapter_fusion.h"

namespace fusetune::FUSETUNE_ISA {

// out = a x + b y
template <class T>
static void combine(float a, const float* x, float b, const float* y, int64_t n, T* out) {
  const F left = set1(a), right = set1(b);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(out + j, fma(left, load(x + j), mul(right, load(y + j))));
  if (j == n) return;
  const int lanes = static_cast<int>(n - j);
  store_part(out + j, fma(left, load_part(x + j, lanes), mul(right, load_part(y + j, lanes))), lanes);
}

void fusion_attend_backward(const Matrix& dctx, const Matrix& g, int64_t m, int64_t h, const FusionValues& values,
                            const float* p, float temperature, const Dropout& dropout, int64_t dropout_row,
                            const MutMatrix& dg, const MutMatrix& ctx, void* const* dvalues, float* doffset) {
  const int64_t n = values.count, block_floats = kRows * padded(h);
  const bool dropped = dropout.threshold != 0;
  const auto block_backward = [&](auto* type, int64_t first_row, int64_t rows) {
    using T = std::remove_pointer_t<decltype(type)>;
    float* buffer = workspace(5 * block_floats + 2 * padded(kRows * n));
    float* factors = buffer + 5 * block_floats;
    float* ds = factors + padded(kRows * n);
    const Floats2d upper = read_rows(dctx, first_row, rows, h, buffer);
    const Floats2d out = rows_to_write(dg, first_row, h, buffer + block_floats);
    const Floats2d own{buffer + 2 * block_floats, padded(h)};
    const Floats2d attended = ctx.data ? rows_to_write(ctx, first_row, h, buffer + 4 * block_floats) : own;
    const Floats2d mean = dropped ? own : attended;  // sum_i p_i values_i, after dropout
    for (int64_t r = 0; r < rows; ++r) {
      memset(out.row(r), 0, h * sizeof(float));
      memset(mean.row(r), 0, h * sizeof(float));
      if (ctx.data && dropped) memset(attended.row(r), 0, h * sizeof(float));
    }
    dropout_factors(dropout, (dropout_row + first_row) * n, rows * n, factors);
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
      if (ctx.data && dropped) group.add_to(1, p + (first_row + r) * n + first, h, attended.row(r));
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
    if (ctx.data) write_rows(ctx, first_row, rows, h, attended);
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
