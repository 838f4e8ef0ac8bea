// dx [M, K] = dy [M, N] . W [N, K] + mask * scale * left [M, r] . right [r, K], W 4-bit or dense; or added to dx.
//
// The tail goes into the accumulators first, is masked there, and then the main product is added: nothing of the
// size of dx exists but dx.
#include "dropout.h"
#include "gemm.h"
#include "gemm_dense.h"
#if defined(FUSETUNE_ISA_AMX)
#include "gemm_tiles.h"
#endif

namespace fusetune {
namespace FUSETUNE_ISA {
namespace {

// Applies the dropout of a [.., k] matrix to the block. Four neighbours along k share one Philox counter and the block
// is transposed, so it is turned over a strip of kLanes rows at a time.
void mask_block(Block<RowsAreDepth>& block, const Dropout& dropout, int64_t k) {
  constexpr int64_t kSpan = 256, kStride = kSpan + kLanes;
  float* strip = block.buffer;  // [kLanes][kStride], columns rounded up to whole vectors
  static_assert(kLanes * kStride <= RowsAreDepth<Floats>::buffer, "the strip must fit");
  for (int64_t r = 0; r < block.rows; r += kLanes) {
    const int64_t rows = std::min<int64_t>(kLanes, block.rows - r);
    for (int64_t c = 0; c < block.columns; c += kSpan) {
      const int64_t columns = std::min(kSpan, block.columns - c);
      float* acc = block.acc + c * block.ld + r;
      transpose_to(acc, block.ld, columns, kLanes, strip, kStride, columns);
      for (int64_t i = 0; i < rows; ++i) {
        apply_dropout(dropout, (block.row + r + i) * k + block.column + c, columns, strip + i * kStride);
      }
      transpose_to(strip, kStride, kLanes, columns, acc, block.ld, kLanes);
    }
  }
}

}  // namespace

void linear_dx(const Matrix& dy, int64_t m, int64_t n, int64_t k, const Weight& w, const LowRank& tail,
               const Dropout& dropout, bool add, const MutMatrix& dx) {
  const bool masked = tail.rank && dropout.threshold;  // the tail alone: not in place of a sum
  if (gemm_dense_fits(dy, m, n, w, dx) && !(add && masked)) {
    const DenseTerm low_rank{tail.left, tail.rank, tail.right, k, tail.rank, tail.scale};
    return gemm_dense<false>(m, k, nullptr, low_rank, dropout, dense_term(dy, w.dense, n, 1.f), dx, add);
  }
#if defined(FUSETUNE_ISA_AMX)
  if (tiles_fit(dy, m, w)) return linear_dx_tiles(dy, m, n, k, w, tail, masked ? dropout : Dropout{}, add, dx);
#endif
  const Term low_rank{
      {tail.left, tail.rank, Dtype::f32}, dense_rows({tail.right, k, Dtype::f32}, tail.scale), tail.rank};
  with_elements(dy, w, n, [&](auto elements) {
    using Elements = decltype(elements);
    const Rows weight = weight_rows(w);
    const Term main{dy, weight, n, share_left<RowsAreDepth, Elements>(dy, m, n, weight)};
    for_blocks<RowsAreDepth>(m, k, [&](Block<RowsAreDepth>& block) {
      block.fill(nullptr);
      block.template accumulate<Floats>(low_rank);
      if (masked) mask_block(block, dropout, k);
      if (add) block.add(dx);
      block.template accumulate<Elements>(main);
      block.write(dx);
    });
  });
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
