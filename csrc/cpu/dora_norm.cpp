// norm [N] = || W [N, K] + scale * B [N, r] . A [r, K] || by rows, W 4-bit or dense: what DoRA divides by.
//
// Tiling. A task is 8 rows (AVX2: 4), columns in steps of 512: they are decoded into a buffer in L1 (16 KB), and register
// tiles of those rows x 2 vectors of columns sum B . A over the ranks, add the weight and square. Nothing is written but
// the norms.
//
// Bytes: W once (4-bit: N K / 2 and its statistics); A, r x K, comes from L2 for each task. Floor: N K r FMAs.
#include <cmath>

#include "convert.h"
#include "isa_kernels.h"
#include "parallel.h"
#include "rows.h"

namespace fusetune {
namespace FUSETUNE_ISA {
namespace {

#if defined(FUSETUNE_ISA_AVX2)
constexpr int kRows = 4;  // 16 registers
#else
constexpr int kRows = 8;
#endif
constexpr int64_t kCols = 512;

struct Operands {
  const float *w, *a, *b;  // [rows][kCols], [rank][lda], [rows][rank]
  int64_t lda, rank;
  float scale;
};

// squares[row] += (w + scale * b . a)^2 for `vectors` vectors of columns from `col` on, read from a by load_a.
template <int rows, int vectors, class Load>
FUSETUNE_INLINE void square_tile(const Operands& in, int64_t col, const Load& load_a, F (&squares)[rows]) {
  F acc[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) acc[i][v] = zero();
  }
  for (int64_t r = 0; r < in.rank; ++r) {
    F av[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) av[v] = load_a(in.a + r * in.lda + col + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const F bv = set1(in.b[i * in.rank + r]);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) acc[i][v] = fma(bv, av[v], acc[i][v]);
    }
  }
  const F scale = set1(in.scale);
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      const F merged = fma(scale, acc[i][v], load(in.w + i * kCols + col + v * kLanes));
      squares[i] = fma(merged, merged, squares[i]);
    }
  }
}

// Norms of `rows` rows of the weight from `row` on.
template <int rows>
void norms(const Rows& weight, int64_t row, int64_t k, const float* lora_A, const float* lora_B, int64_t rank,
           float scale, float* norm) {
  alignas(64) float buffer[rows * kCols];
  F squares[rows];
  for (F& v : squares) v = zero();
  for (int64_t d = 0; d < k; d += kCols) {
    const int64_t cols = d + kCols <= k ? kCols : k - d;
    const int rest = static_cast<int>(cols % kLanes);
    weight.read(row, rows, d, cols, buffer, kCols);
    for (int i = 0; rest && i < rows; ++i) {
      for (int64_t c = cols; c < cols + kLanes - rest; ++c) buffer[i * kCols + c] = 0.0f;
    }
    const Operands in{buffer, lora_A + d, lora_B + row * rank, k, rank, scale};
    int64_t c = 0;
    for (; c + 2 * kLanes <= cols; c += 2 * kLanes) {
      square_tile<rows, 2>(in, c, [](const float* p) { return load(p); }, squares);
    }
    for (; c < cols; c += kLanes) {
      const int n = static_cast<int>(cols - c < kLanes ? cols - c : kLanes);
      square_tile<rows, 1>(in, c, [n](const float* p) { return load_part(p, n); }, squares);
    }
  }
  for (int i = 0; i < rows; ++i) norm[row + i] = std::sqrt(hsum(squares[i]));
}

}  // namespace

void dora_norm(const Weight& w, int64_t n, int64_t k, const float* lora_A, const float* lora_B, int64_t rank,
               float scale, float* norm) {
  const Rows weight = weight_rows(w);
  parallel_chunks((n + kRows - 1) / kRows, [&](int64_t task) {
    int64_t row = task * kRows;
    if (row + kRows <= n) return norms<kRows>(weight, row, k, lora_A, lora_B, rank, scale, norm);
    for (; row < n; ++row) norms<1>(weight, row, k, lora_A, lora_B, rank, scale, norm);
  });
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
