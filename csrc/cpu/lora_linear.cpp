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
#include "lora.h"
#include "parallel.h"
#include "workspace.h"

namespace fusetune {
namespace FUSETUNE_ISA {
namespace {

// Walks x [m, cols] in buffers of kRows x kCols, one task per block of rows and columns, and calls
// visit(buffer, row, rows, col, width) for each.
template <class Visit>
void for_buffers(const Matrix& x, int64_t m, int64_t cols, const Dropout& dropout, const Visit& visit) {
  const int64_t task_rows = rows_of_task(m), row_tasks = ceil_div(m, task_rows);
  parallel_chunks(row_tasks * ceil_div(cols, kTaskCols), [&](int64_t task) {
    const int64_t row = task % row_tasks * task_rows, col = task / row_tasks * kTaskCols;
    visit_buffers(x, row, least(m, row + task_rows), col, least(cols, col + kTaskCols), cols, dropout,
                  [](int64_t i) { return i; }, visit);
  });
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

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
