// y [M, N] = x [M, K] . W [N, K]^T + bias + scale * left [M, r] . right [N, r]^T, W 4-bit or dense.
//
// The low-rank tail is one more slice of the reduction in the same accumulators: no pass over y of its own.
#include "gemm.h"
#include "gemv.h"

namespace fusetune {
namespace FUSETUNE_ISA {

void linear(const Matrix& x, int64_t m, int64_t n, int64_t k, const Weight& w, const float* bias, const LowRank& tail,
            const MutMatrix& y) {
  if (gemv_fits(m, k, w)) return linear_gemv(x, m, n, k, w, bias, tail, y);
  const Term main{x, weight_rows(w), k};
  const Term low_rank{
      {tail.left, tail.rank, Dtype::f32}, dense_rows({tail.right, tail.rank, Dtype::f32}, tail.scale), tail.rank};
  for_blocks<RowsAreColumns>(m, n, [&](Block<RowsAreColumns>& block) {
    block.fill(bias);
    block.accumulate(low_rank);
    block.accumulate(main);
    block.write(y);
  });
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
