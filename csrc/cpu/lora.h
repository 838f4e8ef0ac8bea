// What the low-rank products of one LoRA adapter (lora_linear.cpp) and of several (multi_lora_linear.cpp) share: buffers
// of rows in fp32, register tiles, sums of parts.
//
// Tiling: see lora_linear.cpp.
#pragma once
#include "convert.h"
#include "dropout.h"
#include "gemm.h"
#include "isa_kernels.h"
#include "outer.h"

namespace fusetune::FUSETUNE_ISA {

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Elements [col, col + n) of a row of x [., cols], dropped and widened, then padded to whole vectors.
static inline void load_row(const Matrix& x, int64_t row, int64_t col, int64_t n, const Dropout& dropout, int64_t cols,
                            float* out) {
  load_floats(x.data, x.dtype, row * x.ld + col, n, out);
  apply_dropout(dropout, row * cols + col, n, out);
}

// Rows lie pages apart, which the hardware does not foresee.
static inline void prefetch_row(const Matrix& x, int64_t row, int64_t col, int64_t n) {
  const int64_t size = x.dtype == Dtype::f32 ? 4 : 2;
  const char* p = static_cast<const char*>(x.data) + (row * x.ld + col) * size;
  for (int64_t byte = 0; byte < n * size; byte += 64) __builtin_prefetch(p + byte);
}

// ---- forward

// Registers: rows x ranks accumulators, the rows' vectors of x and one of A.
#if defined(FUSETUNE_ISA_AVX2)
constexpr int kDotRows = 3, kDotRanks = 4;  // 16 registers
#else
constexpr int kDotRows = 4, kDotRanks = 4;
#endif
constexpr int64_t kDepth = 1024;

// s[row][rank] (+)= sum over depth of x[row][.] * a[rank][.]
template <int rows, int ranks>
static void dot_tile(const float* x, const float* a, int64_t lda, int64_t depth, bool add_to, float* s, int64_t lds) {
  F acc[rows][ranks];
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < ranks; ++j) acc[i][j] = zero();
  }
  const auto step = [&](int64_t d, const auto& load_a) __attribute__((always_inline)) {
    F xv[rows];
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) xv[i] = load(x + i * kDepth + d);
#pragma GCC unroll 4
    for (int j = 0; j < ranks; ++j) {
      const F av = load_a(a + j * lda + d);
#pragma GCC unroll 4
      for (int i = 0; i < rows; ++i) acc[i][j] = fma(xv[i], av, acc[i][j]);
    }
  };
  int64_t d = 0;
  for (; d + kLanes <= depth; d += kLanes) step(d, [](const float* p) { return load(p); });
  if (d < depth) step(d, [&](const float* p) { return load_part(p, static_cast<int>(depth - d)); });
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < ranks; ++j) s[i * lds + j] = hsum(acc[i][j]) + (add_to ? s[i * lds + j] : 0.0f);
  }
}

template <int rows>
static void dot_ranks(const float* x, const float* a, int64_t lda, int64_t depth, int64_t rank, bool add_to, float* s) {
  int64_t j = 0;
  for (; j + kDotRanks <= rank; j += kDotRanks) {
    dot_tile<rows, kDotRanks>(x, a + j * lda, lda, depth, add_to, s + j, rank);
  }
  for (; j < rank; ++j) dot_tile<rows, 1>(x, a + j * lda, lda, depth, add_to, s + j, rank);
}

// ---- backward

constexpr int64_t kRows = 32, kCols = 128, kTaskCols = 512;
#if defined(FUSETUNE_ISA_AVX2)
constexpr int kTile = 4;  // 16 registers
#else
constexpr int kTile = 8;
#endif

// c[i][vectors] (+)= sum over depth of scalars(i, depth) * vectors(depth)
template <int count, int vectors>
static void add_outer_tile(const Scalars& a, const Vectors& b, int64_t depth, bool add_to, float* c, int64_t ldc) {
  F acc[count][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) acc[i][v] = add_to ? load(c + i * ldc + v * kLanes) : zero();
  }
  add_products(a, b, depth, acc, [] {});
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) store(c + i * ldc + v * kLanes, acc[i][v]);
  }
}

// c[count][width] (+)= scalars . vectors; width is a multiple of kLanes.
static inline void add_outer(const Scalars& a, int64_t count, const Vectors& b, int64_t width, int64_t depth, bool add_to, float* c,
               int64_t ldc) {
  for (int64_t j = 0; j < width; j += 2 * kLanes) {
    const bool two = j + 2 * kLanes <= width;
    const Vectors bj{b.data + j, b.depth_stride};
    int64_t i = 0;
    for (; i + kTile <= count; i += kTile) {
      const Scalars ai{a.data + i * a.stride, a.stride, a.depth_stride};
      two ? add_outer_tile<kTile, 2>(ai, bj, depth, add_to, c + i * ldc + j, ldc)
          : add_outer_tile<kTile, 1>(ai, bj, depth, add_to, c + i * ldc + j, ldc);
    }
    for (; i < count; ++i) {
      const Scalars ai{a.data + i * a.stride, a.stride, a.depth_stride};
      two ? add_outer_tile<1, 2>(ai, bj, depth, add_to, c + i * ldc + j, ldc)
          : add_outer_tile<1, 1>(ai, bj, depth, add_to, c + i * ldc + j, ldc);
    }
  }
}

static inline int64_t rows_of_task(int64_t m) { return m <= 2048 ? 256 : ceil_div(ceil_div(m, 8), kRows) * kRows; }

// Fills buffers of kRows x kCols from rows [first_row, end_row) and columns [first_col, end_col) of x [., cols], row i
// being row_at(i) of x, and calls visit(buffer, row, rows, col, width) for each.
template <class RowAt, class Visit>
static void visit_buffers(const Matrix& x, int64_t first_row, int64_t end_row, int64_t first_col, int64_t end_col,
                          int64_t cols, const Dropout& dropout, const RowAt& row_at, const Visit& visit) {
  alignas(64) float buffer[kRows * kCols];
  for (int64_t col = first_col; col < end_col; col += kCols) {
    const int64_t width = least(kCols, end_col - col);
    for (int64_t row = first_row; row < end_row; row += kRows) {
      const int64_t rows = least(kRows, end_row - row);
      for (int64_t i = 0; i < rows; ++i) {
        if (row + i + kRows < end_row) prefetch_row(x, row_at(row + i + kRows), col, width);
        load_row(x, row_at(row + i), col, width, dropout, cols, buffer + i * kCols);
      }
      visit(buffer, row, rows, col, width);
    }
  }
}

// out[rows][cols] = scale * sum over parts of part[rows][ld], in their order.
static inline void add_parts(const float* parts, int64_t count, int64_t rows, int64_t ld, int64_t cols, float scale, float* out) {
  constexpr int64_t kTask = 16384;
  const int64_t task_rows = ceil_div(kTask, ld);
  parallel_chunks(ceil_div(rows, task_rows), [&](int64_t task) {
    for (int64_t i = task * task_rows; i < least(rows, (task + 1) * task_rows); ++i) {
      for (int64_t j = 0; j < cols; j += kLanes) {
        F sum = zero();
        for (int64_t p = 0; p < count; ++p) sum = add(sum, load(parts + (p * rows + i) * ld + j));
        sum = mul(sum, set1(scale));
        const int64_t n = cols - j;
        n >= kLanes ? store(out + i * cols + j, sum) : store_part(out + i * cols + j, sum, static_cast<int>(n));
      }
    }
  });
}

// scale * in[rows][cols] with rows padded by zeros to ld.
static inline void pad_rows(const float* in, int64_t rows, int64_t cols, float scale, int64_t ld, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < ld; ++j) out[i * ld + j] = j < cols ? scale * in[i * cols + j] : 0.0f;
  }
}

}  // namespace fusetune::FUSETUNE_ISA
