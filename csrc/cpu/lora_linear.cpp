// The low-rank products of a LoRA layer: s = drop(x) A^T forward, ds = dy B, dB = dy^T s, dA = ds^T drop(x) backward.
//
// Each reads its big operand (x or dy) once, widens it to fp32 (with the dropout mask made anew) into a buffer in L1,
// and does everything it needs there. ds and dB come from one read of dy.
//
// Tiling. s: tasks of 4 rows (AVX2: 3), depth in steps of 1024 (16 KB buffer), register tiles of those rows x 4 ranks
// whose lanes run along the depth, so A is used as it lies. Backward: tasks of up to 256 rows x 512 columns, buffers of
// 32 rows x 128 columns (16 KB), register tiles of 8 (AVX2: 4) broadcasts x 2 vectors. Tasks depend on the shape alone
// and their partial sums are added in order, so results do not depend on the number of threads.
//
// Bytes: M x K of x (or dy) once; A and B, r x K, stay in L2. Floor: M x K x r FMAs (ds and dB: twice that), at r = 16
// on AVX-512 one cycle per element of x where a vector FMA starts every cycle, and with dropout Philox's 0.94.
// Measured at M = 512, r = 16 on one core of a Zen 4 (105 GF/s), share of the FMA floor for K = 576 / 1536 / 4096:
// s 0.74 / 0.79 / 0.73, dA 0.69 / 0.73 / 0.61, ds and dB 0.86 / 0.90 / 0.68, with dropout s and dA 0.37 / 0.38 / 0.33.
// The gap: filling the buffers (2 of 16 instructions), sums of short tiles, at 4096 the memory (8 MB at 20 GB/s take
// as long as 40 % of the FMAs), with dropout 1.3 cycles of Philox per element.
#include "convert.h"
#include "dropout.h"
#include "isa_kernels.h"
#include "outer.h"
#include "parallel.h"
#include "workspace.h"

namespace fusetune {
namespace FUSETUNE_ISA {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t whole_vectors(int64_t n) { return ceil_div(n, kLanes) * kLanes; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Elements [col, col + n) of a row of x [., cols], dropped and widened, then padded to whole vectors.
void load_row(const Matrix& x, int64_t row, int64_t col, int64_t n, const Dropout& dropout, int64_t cols, float* out) {
  load_floats(x.data, x.dtype, row * x.ld + col, n, out);
  apply_dropout(dropout, row * cols + col, n, out);
}

// Rows lie pages apart, which the hardware does not foresee.
void prefetch_row(const Matrix& x, int64_t row, int64_t col, int64_t n) {
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
void dot_tile(const float* x, const float* a, int64_t lda, int64_t depth, bool add_to, float* s, int64_t lds) {
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
void dot_ranks(const float* x, const float* a, int64_t lda, int64_t depth, int64_t rank, bool add_to, float* s) {
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
void add_outer_tile(const Scalars& a, const Vectors& b, int64_t depth, bool add_to, float* c, int64_t ldc) {
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
void add_outer(const Scalars& a, int64_t count, const Vectors& b, int64_t width, int64_t depth, bool add_to, float* c,
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

int64_t rows_of_task(int64_t m) { return m <= 2048 ? 256 : ceil_div(ceil_div(m, 8), kRows) * kRows; }

// Walks x [m, cols] in buffers of kRows x kCols, one task per block of rows and columns, and calls
// visit(buffer, row, rows, col, width) for each.
template <class Visit>
void for_buffers(const Matrix& x, int64_t m, int64_t cols, const Dropout& dropout, const Visit& visit) {
  const int64_t task_rows = rows_of_task(m), row_tasks = ceil_div(m, task_rows);
  parallel_chunks(row_tasks * ceil_div(cols, kTaskCols), [&](int64_t task) {
    alignas(64) float buffer[kRows * kCols];
    const int64_t first_row = task % row_tasks * task_rows, end_row = least(m, first_row + task_rows);
    const int64_t first_col = task / row_tasks * kTaskCols, end_col = least(cols, first_col + kTaskCols);
    for (int64_t col = first_col; col < end_col; col += kCols) {
      const int64_t width = least(kCols, end_col - col);
      for (int64_t row = first_row; row < end_row; row += kRows) {
        const int64_t rows = least(kRows, end_row - row);
        for (int64_t i = 0; i < rows; ++i) {
          if (row + i + kRows < end_row) prefetch_row(x, row + i + kRows, col, width);
          load_row(x, row + i, col, width, dropout, cols, buffer + i * kCols);
        }
        visit(buffer, row, rows, col, width);
      }
    }
  });
}

// out[rows][cols] = scale * sum over parts of part[rows][ld], in their order.
void add_parts(const float* parts, int64_t count, int64_t rows, int64_t ld, int64_t cols, float scale, float* out) {
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
void pad_rows(const float* in, int64_t rows, int64_t cols, float scale, int64_t ld, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < ld; ++j) out[i * ld + j] = j < cols ? scale * in[i * cols + j] : 0.0f;
  }
}

}  // namespace

void lora_shrink(const Matrix& x, int64_t m, int64_t k, const float* lora_A, int64_t rank, const Dropout& dropout,
                 float* s) {
  if (k == 0) memset(s, 0, static_cast<size_t>(m * rank) * sizeof(float));
  parallel_chunks(ceil_div(m, kDotRows), [&](int64_t task) {
    alignas(64) float buffer[kDotRows * kDepth];
    const int64_t row = task * kDotRows, rows = least(kDotRows, m - row);
    for (int64_t d = 0; d < k; d += kDepth) {
      const int64_t depth = least(kDepth, k - d);
      for (int64_t i = 0; i < rows; ++i) load_row(x, row + i, d, depth, dropout, k, buffer + i * kDepth);
      if (rows == kDotRows) {
        dot_ranks<kDotRows>(buffer, lora_A + d, k, depth, rank, d > 0, s + row * rank);
        continue;
      }
      for (int64_t i = 0; i < rows; ++i) {
        dot_ranks<1>(buffer + i * kDepth, lora_A + d, k, depth, rank, d > 0, s + (row + i) * rank);
      }
    }
  });
}

void lora_ds_db(const Matrix& dy, int64_t m, int64_t n, const float* lora_B, const float* s, int64_t rank, float scale,
                float* ds, float* dB) {
  const int64_t ld = whole_vectors(rank);
  const int64_t row_parts = ceil_div(m, rows_of_task(m)), col_parts = ceil_div(n, kTaskCols);
  float* const scaled_s = workspace((m + n + col_parts * m + row_parts * n) * ld);
  float* const padded_B = scaled_s + m * ld;
  float* const ds_parts = padded_B + n * ld;
  float* const dB_parts = ds_parts + col_parts * m * ld;
  pad_rows(s, m, rank, scale, ld, scaled_s);
  if (ld != rank) pad_rows(lora_B, n, rank, 1.0f, ld, padded_B);
  const float* const B = ld != rank ? padded_B : lora_B;

  for_buffers(dy, m, n, {}, [&](const float* buffer, int64_t row, int64_t rows, int64_t col, int64_t width) {
    float* const ds_part = ds_parts + (col / kTaskCols * m + row) * ld;
    float* const dB_part = dB_parts + (row / rows_of_task(m) * n + col) * ld;
    add_outer({buffer, kCols, 1}, rows, {B + col * ld, ld}, ld, width, col % kTaskCols != 0, ds_part, ld);
    add_outer({buffer, 1, kCols}, width, {scaled_s + row * ld, ld}, ld, rows, row % rows_of_task(m) != 0, dB_part, ld);
  });
  add_parts(ds_parts, col_parts, m, ld, rank, scale, ds);
  add_parts(dB_parts, row_parts, n, ld, rank, 1.0f, dB);
}

void lora_da(const Matrix& x, int64_t m, int64_t k, const float* ds, int64_t rank, const Dropout& dropout, float* dA) {
  const int64_t row_parts = ceil_div(m, rows_of_task(m)), ld = whole_vectors(k);
  const bool direct = row_parts == 1 && ld == k;
  float* const parts = direct ? dA : workspace(row_parts * rank * ld);
  for_buffers(x, m, k, dropout, [&](const float* buffer, int64_t row, int64_t rows, int64_t col, int64_t width) {
    float* const part = parts + row / rows_of_task(m) * rank * ld + col;
    add_outer({ds + row * rank, 1, rank}, rank, {buffer, kCols}, whole_vectors(width), rows,
              row % rows_of_task(m) != 0, part, ld);
  });
  if (!direct) add_parts(parts, row_parts, rank, ld, k, 1.0f, dA);
}

void dropout(const Matrix& x, int64_t m, int64_t k, const Dropout& dropout, const MutMatrix& out) {
  parallel_chunks(m, [&](int64_t row) {
    alignas(64) float buffer[kDepth];
    for (int64_t d = 0; d < k; d += kDepth) {
      const int64_t n = least(kDepth, k - d);
      load_row(x, row, d, n, dropout, k, buffer);
      store_floats(buffer, out.data, out.dtype, row * out.ld + d, n);
    }
  });
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
