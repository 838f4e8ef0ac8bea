// The macro kernel of linear and linear_dx for many rows of fp32 and a dense fp32 weight: out [m, n] = bias + sum over
// terms of left [m, depth] . right.
//
// Tiling. Lanes run along the columns of the output, so that neither left nor out is transposed, as gemm.h has to do
// for a weight it decodes: a task packs a slice of its columns of the weight, up to 4 panels [depth][48], and multiplies
// it from there with 8 rows at a time (outer.h), which are read and written where they are.
// Bytes per task and slice: its columns of the weight read once, asked for while the slice before is multiplied, and
// written once to L2; left once from memory, then from L1 for each panel; a panel from L2 for every 8 rows (8 bytes a
// cycle); out written once, from the second slice on read too. Measured on a
// Zen 4, fp32, 1024 rows: 0.93 to 0.96 of the FMA peak where gemm.h reaches 0.88 to 0.91; on a Zen 3 0.87 to 0.92.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../parallel.h"
#include "dropout.h"
#include "gemm.h"
#include "outer.h"
#include "workspace.h"

namespace fusetune::FUSETUNE_ISA {

struct DenseTerm {
  const float* left;  // [m, depth]
  int64_t left_ld;
  const float* right;  // [n, depth] where its rows are columns of the output, else [depth, n]
  int64_t right_ld;
  int64_t depth;
  float scale;  // on right
};

// Packing a weight for fewer rows costs more than gemm.h's transposing; on AVX2, where gemm.h reads a weight in place or
// copies it beside the tiles, for more rows only, and not where rows lie far apart.
constexpr int64_t kDenseRows = kTilesReadRows ? 256 : 128;
constexpr int64_t kDenseDepth = kTilesReadRows ? 1024 : INT64_MAX;
constexpr int64_t kDenseStep = 8;    // rows at a time
constexpr int64_t kDensePanels = 4, kDenseSlice = 576;

static inline bool gemm_dense_fits(const Matrix& left, int64_t m, int64_t depth, const Weight& w, const MutMatrix& out) {
  return m >= kDenseRows && depth > 0 && depth <= kDenseDepth && !w.quantized && w.dense.dtype == Dtype::f32 && left.dtype == Dtype::f32 &&
         out.dtype == Dtype::f32;
}

static inline DenseTerm dense_term(const Matrix& left, const Matrix& right, int64_t depth, float scale) {
  return {static_cast<const float*>(left.data), left.ld, static_cast<const float*>(right.data), right.ld, depth, scale};
}

// A task's rows and columns of the output.
struct DenseBlock {
  float* out;  // its first element
  int64_t ld, row, rows, column, columns;
  const float* bias;       // of its columns, or null
  float *packed, *rest;    // parts of the workspace: the weight's slice, and kDenseStep rows of a panel
  bool written = false;    // out holds the sum so far

  int64_t panels() const { return (columns + kPanel - 1) / kPanel; }

  // packed[panel][depth][kPanel] = the slice of right that begins at d; zeros beyond the last column
  template <bool rows_are_columns>
  void pack(const DenseTerm& term, int64_t d, int64_t depth) const {
    const int64_t size = depth * kPanel;
    if constexpr (rows_are_columns) {
      for (int64_t p = 0, c = 0; c < columns; ++p, c += kPanel) {
        const float* const from = term.right + (column + c) * term.right_ld + d;
        const int64_t width = std::min(kPanel, columns - c);
        transpose_to(from, term.right_ld, width, depth, packed + p * size, kPanel, kPanel);
      }
      if (term.scale == 1.f) return;
      const F scale = set1(term.scale);
      for (float *v = packed, *end = packed + panels() * size; v < end; v += kLanes) store(v, mul(load(v), scale));
      return;
    }
    const F scale = set1(term.scale);
    for (int64_t i = 0; i < depth; ++i) {
      const float* const from = term.right + (d + i) * term.right_ld + column;
      float* to = packed + i * kPanel;
      for (int64_t c = 0; c < columns; c += kLanes) {
        __builtin_prefetch(from + kPrefetchRows * term.right_ld + c);
        float* const v = to + c / kPanel * size + c % kPanel;
        const int count = static_cast<int>(std::min<int64_t>(kLanes, columns - c));
        store(v, mul(count == kLanes ? load(from + c) : load_part(from + c, count), scale));
      }
    }
  }

  // Part `part` of `parts` of what pack reads of the slice at d of the columns that begin `skip` after the task's.
  template <bool rows_are_columns>
  Region region(const DenseTerm& term, int64_t d, int64_t depth, int64_t skip, int64_t part, int64_t parts) const {
    const int64_t high = rows_are_columns ? columns : depth, wide = rows_are_columns ? depth : columns;
    const int64_t row = high * part / parts, first = column + skip;
    const float* const from = term.right + (rows_are_columns ? (first + row) * term.right_ld + d
                                                             : (d + row) * term.right_ld + first);
    return {reinterpret_cast<const char*>(from), term.right_ld * 4, high * (part + 1) / parts - row, (wide * 4 + 63) / 64};
  }

  // `next`: where the columns of the task begin that this thread is likely to take next, after its own; 0: unknown.
  template <bool rows_are_columns>
  void accumulate(const DenseTerm& term, int64_t next) {
    const int64_t slices = (term.depth + kDenseSlice - 1) / kDenseSlice;
    const int64_t step = slices ? (term.depth + slices - 1) / slices : 1;
    const int64_t groups = (rows + kDenseStep - 1) / kDenseStep;
    for (int64_t d = 0; d < term.depth; d += step) {
      const int64_t depth = std::min(step, term.depth - d), left = term.depth - d - depth;
      pack<rows_are_columns>(term, d, depth);
      for (int64_t g = 0, r = 0; g < groups; ++g, r += kDenseStep) {
        const int64_t count = std::min(kDenseStep, rows - r), below = std::min(kDenseStep, rows - r - count);
        const float* const from = term.left + (row + r) * term.left_ld + d;
        // Asked for meanwhile: the rows of left that come next, and a share of the weight that is packed next.
        const Region rows_below{reinterpret_cast<const char*>(from + count * term.left_ld), term.left_ld * 4, below,
                                (depth * 4 + 63) / 64};
        Region weight{};
        if (left > 0) weight = region<rows_are_columns>(term, d + depth, std::min(step, left), 0, g, groups);
        if (left <= 0 && next) weight = region<rows_are_columns>(term, 0, step, next, g, groups);
        Ahead ahead = below > 0 ? Ahead(rows_below, weight) : Ahead(weight);
        for (int64_t c = 0; c < columns; c += kPanel) {
          multiply({from, term.left_ld, 1}, count, packed + c * depth, depth, r, c, ahead);
        }
      }
      written = true;
    }
  }

  // A panel's columns of `count` rows from r.
  void multiply(const Scalars& left, int64_t count, const float* panel, int64_t depth, int64_t r, int64_t c,
                Ahead& ahead) const {
    float* const to = out + r * ld + c;
    const int64_t width = std::min(kPanel, columns - c), whole = width / kLanes * kLanes;
    const float* const init = !written && bias ? bias + c : nullptr;
    outer(left, count, {panel, kPanel}, whole, depth, {to, ld, written ? to : nullptr, ld, init}, ahead);
    if (whole == width) return;
    outer(left, count, {panel + whole, kPanel}, kLanes, depth, {rest, kLanes, nullptr, 0, nullptr}, ahead);
    const int last = static_cast<int>(width - whole);
    for (int64_t i = 0; i < count; ++i) {
      float* const p = to + i * ld + whole;
      const F before = written ? load_part(p, last) : init ? load_part(init + whole, last) : zero();
      store_part(p, add(before, load(rest + i * kLanes)), last);
    }
  }

  // Drops out what has been written so far; `width` is that of the whole output.
  void mask(const Dropout& dropout, int64_t width) const {
    const int64_t whole = columns / kLanes * kLanes;
    const int last = static_cast<int>(columns - whole);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t index = (row + i) * width + column;
      apply_dropout(dropout, index, whole, out + i * ld);
      if (!last) continue;
      float* const p = out + i * ld + whole;
      store(rest, load_part(p, last));
      apply_dropout(dropout, index + whole, last, rest);
      store_part(p, load(rest), last);
    }
  }
};

// out (+)= bias + drop(tail) + main; no dropout where it is added to.
template <bool rows_are_columns>
static void gemm_dense(int64_t m, int64_t n, const float* bias, const DenseTerm& tail, const Dropout& dropout,
                       const DenseTerm& main, const MutMatrix& out, bool add = false) {
  const int64_t threads = num_threads(), panels = (n + kPanel - 1) / kPanel;
  // Few parts of rows, since each packs the weight again, but several tasks a thread: a stolen core costs one of them.
  const int64_t per_task = std::max<int64_t>(1, std::min(kDensePanels, panels / (2 * threads)));
  const int64_t column_parts = (panels + per_task - 1) / per_task;
  const int64_t wanted = std::max<int64_t>(1, (4 * threads + column_parts - 1) / column_parts);
  const int64_t row_step = ((m + wanted - 1) / wanted + kDenseStep - 1) / kDenseStep * kDenseStep;
  const int64_t row_parts = (m + row_step - 1) / row_step;
  parallel_chunks(column_parts * row_parts, [&](int64_t task) {
    const int64_t row = task % row_parts * row_step, column = task / row_parts * per_task * kPanel;
    const int64_t columns = std::min(per_task * kPanel, n - column);
    float* const packed = workspace(per_task * kPanel * kDenseSlice + kDenseStep * kLanes);
    float* const first = static_cast<float*>(out.data) + row * out.ld + column;
    DenseBlock block{first,   out.ld, row,    std::min(row_step, m - row),
                     column,  columns, bias ? bias + column : nullptr,
                     packed,  packed + per_task * kPanel * kDenseSlice};
    block.written = add;
    block.template accumulate<rows_are_columns>(tail, 0);
    if (tail.depth && dropout.threshold) block.mask(dropout, n);
    const int64_t skip = (std::max<int64_t>(1, threads / row_parts)) * per_task * kPanel;
    block.template accumulate<rows_are_columns>(main, column + skip + columns <= n ? skip : 0);
  });
}

}  // namespace fusetune::FUSETUNE_ISA
