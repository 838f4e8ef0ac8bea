// y [M, N] = x [M, K] . W [N, K]^T + bias + scale * left [M, r] . right [N, r]^T, W 4-bit or dense.
//
// Tiling and bytes: gemv.h for a few rows of x, gemm.h for more, gemm_dense.h for many where all is fp32, gemm_tiles.h
// for bf16 and a 4-bit weight where the CPU has AMX. The low-rank tail is one more slice of the reduction in the same
// accumulators: no pass over y of its own.
//
// A dense weight against torch (Zen 4, 4096 x 4096, 2 threads): float32 is ahead at every m, 2.1x at 8 and 1.2x at 512;
// float16 from m = 2 on, 4x at 128; bfloat16 only at m = 1, because torch uses the AVX512_BF16 instructions.
#include "gemm.h"
#include "gemm_dense.h"
#include "gemv.h"
#if defined(FUSETUNE_ISA_AMX)
#include "gemm_tiles.h"
#endif

namespace fusetune {
namespace FUSETUNE_ISA {
namespace {

// Whether linear_gemv takes it.
bool gemv_fits(int64_t m, int64_t k, const Weight& w) {
  return m > 0 && m <= kGemvRows && (!w.quantized || k % w.quantized->blocksize == 0);
}

void linear_gemv(const Matrix& x, int64_t m, int64_t n, int64_t k, const Weight& w, const float* bias,
                 const LowRank& tail, const MutMatrix& y) {
  // Read by all threads.
  const int64_t chunks = (k + kChunk - 1) / kChunk, x_size = chunks * m * kChunk;
  float* shared = workspace(x_size + m * tail.rank);
  const GemvArgs args{n, k, shared, bias, shared + x_size, tail.right, tail.rank, y};
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t count = std::min<int64_t>(kChunk, k - c * kChunk);
    for (int64_t s = 0; s < m; ++s) {
      float* dst = shared + (c * m + s) * kChunk;
      if (count < kChunk) std::fill_n(dst, kChunk, 0.f);
      load_floats(x.data, x.dtype, s * x.ld + c * kChunk, count, dst);
#if defined(FUSETUNE_HAS_EVEN_ODD)
      if (!w.quantized) continue;
      for (int j = 0; j < kChunk; j += kLanes) store(dst + j, even_odd(load(dst + j)));
#endif
    }
  }
  for (int64_t i = 0; i < m * tail.rank; ++i) shared[x_size + i] = tail.left[i] * tail.scale;

  if (!w.quantized) {
    if (w.dense.dtype == Dtype::f32)
      return gemv(m, RowDense<float>{static_cast<const float*>(w.dense.data), w.dense.ld, k}, args);
    if (w.dense.dtype == Dtype::f16)
      return gemv(m, RowDense<f16>{static_cast<const f16*>(w.dense.data), w.dense.ld, k}, args);
    return gemv(m, RowDense<bf16>{static_cast<const bf16*>(w.dense.data), w.dense.ld, k}, args);
  }
  const Rows rows = weight_rows(w);
  if (w.quantized->absmax_q)
    return gemv(m, Row4bit<true>(rows), args);
  gemv(m, Row4bit<false>(rows), args);
}

}  // namespace

void linear(const Matrix& x, int64_t m, int64_t n, int64_t k, const Weight& w, const float* bias, const LowRank& tail,
            const MutMatrix& y) {
#if defined(FUSETUNE_ISA_AMX)
  const bool tiles = tiles_fit(x, m, w) && (m > 3 || !gemv_fits(m, k, w));
#else
  constexpr bool tiles = false;
#endif
  if (!tiles && gemv_fits(m, k, w)) return linear_gemv(x, m, n, k, w, bias, tail, y);
  if (gemm_dense_fits(x, m, k, w, y)) {
    const DenseTerm low_rank{tail.left, tail.rank, tail.right, tail.rank, tail.rank, tail.scale};
    return gemm_dense<true>(m, n, bias, low_rank, {}, dense_term(x, w.dense, k, 1.f), y);
  }
  const Term low_rank{
      {tail.left, tail.rank, Dtype::f32}, dense_rows({tail.right, tail.rank, Dtype::f32}, tail.scale), tail.rank};
#if defined(FUSETUNE_ISA_AMX)
  if (tiles) return linear_tiles(x, m, n, k, w, bias, low_rank, y);
#endif
  with_elements(x, w, k, [&](auto elements) {
    using Elements = decltype(elements);
    const Rows weight = weight_rows(w);
    const Term main{x, weight, k, share_left<RowsAreColumns, Elements>(x, m, k, weight)};
    for_blocks<RowsAreColumns>(m, n, [&](Block<RowsAreColumns>& block) {
      block.fill(bias);
      block.template accumulate<Floats>(low_rank);
      block.template accumulate<Elements>(main);
      block.write(y);
    });
  });
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
