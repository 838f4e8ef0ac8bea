// The macro kernel of linear and linear_dx: out [rows, columns] = sum over terms of left [rows, depth] . right.
//
// Tiling. A task owns a block of rows x columns of the output and keeps it, transposed and in fp32, in `acc`. For each
// slice of the reduction it packs the left operand once (transposed, so that lanes are rows), then decodes the
// weight one column group at a time into a buffer that stays in L1/L2, and runs register tiles over it. Bytes per
// task and slice: the 4-bit weight is read once (columns * depth / 2), the left slice once (rows * depth * 4), acc
// is read and written once (rows * columns * 8, from L2) for rows * columns * depth FMAs. Neither a dequantised
// weight nor a converted activation exists beyond a slice.
#pragma once
#include <algorithm>

#include "../parallel.h"
#include "gemm_micro.h"
#include "rows.h"
#include "workspace.h"

namespace fusetune {
namespace FUSETUNE_ISA {

// A weight row is an output column (forward). Rows are padded so that they do not fall into the same cache sets.
struct RowsAreColumns {
  static constexpr int group = 8, depth = 512, column_stride = depth + 16, depth_stride = 1;
  static constexpr int buffer = group * column_stride;
  static void read(const Rows& rows, int64_t column, int64_t columns, int64_t d, int64_t steps, float* dst) {
    rows.read(column, columns, d, steps, dst, column_stride);
  }
};
// A weight row is a step of the reduction (backward).
struct RowsAreDepth {
  static constexpr int group = 128, depth = 64, column_stride = 1, depth_stride = group;
  static constexpr int buffer = depth * depth_stride;
  static void read(const Rows& rows, int64_t column, int64_t columns, int64_t d, int64_t steps, float* dst) {
    rows.read(d, steps, column, columns, dst, depth_stride);
  }
};

struct Term {
  Matrix left;  // [rows, depth]
  Rows right;
  int64_t depth;
};

// dst[c * dst_ld + r] = src[r * src_ld + c] for r < rows, c < columns. Writes whole vectors of dst where dst_rows, the
// rows of src that dst has room for, allow it; rows of src from `rows` on count as zero.
template <class T, class U>
static void transpose_to(const T* src, int64_t src_ld, int64_t rows, int64_t columns, U* dst, int64_t dst_ld,
                         int64_t dst_rows) {
  for (int64_t r = 0; r < dst_rows; r += kLanes) {
    const int used = static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(kLanes, rows - r)));
    const int stored = static_cast<int>(std::min<int64_t>(kLanes, dst_rows - r));
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int count = static_cast<int>(std::min<int64_t>(kLanes, columns - c));
      F block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const T* p = src + (r + i) * src_ld + c;
        __builtin_prefetch(p + 4 * kLanes);  // too many streams for the hardware
        block[i] = i >= used ? zero() : count == kLanes ? load(p) : load_part(p, count);
      }
      transpose(block);
      for (int j = 0; j < count; ++j) {
        U* p = dst + (c + j) * dst_ld + r;
        if (stored == kLanes) {
          store(p, block[j]);
        } else {
          store_part(p, block[j], stored);
        }
      }
    }
  }
}

// A panel is the rows that one tile takes: 1 to kMaxVectors vectors, or one narrow vector.
struct Panel {
  int vectors, width;
};
static inline Panel next_panel(int64_t rows) {
  if (rows <= Narrow::lanes) return {1, Narrow::lanes};
  // A rest that fits a narrow vector is left for one.
  const int64_t left_over = Narrow::lanes < kLanes ? Narrow::lanes : 0;
  const int64_t vectors = (rows - left_over + kLanes - 1) / kLanes;
  const int take = static_cast<int>(std::min<int64_t>(vectors, kMaxVectors));
  return {take, take * kLanes};
}

template <class Layout, class Vec, int vectors>
static void panel_tiles(const float* left, const float* right, int64_t depth, int64_t columns, float* acc, int64_t ld) {
  constexpr int step = tile_columns(vectors);
  for (int64_t c = 0; c < columns; c += step) {
    tile<Vec, vectors, step, Layout::column_stride, Layout::depth_stride>(left, right + c * Layout::column_stride,
                                                                          depth, acc + c * ld, ld);
  }
}

// One task's block of the output, transposed: acc [columns][ld].
template <class Layout>
struct Block {
  int64_t row, rows, column, columns;
  int64_t ld;                    // rows rounded up to whole vectors
  float *acc, *packed, *buffer;  // parts of the workspace

  Block(int64_t row, int64_t rows, int64_t column, int64_t columns)
      : row(row), rows(rows), column(column), columns(columns), ld((rows + kLanes - 1) / kLanes * kLanes) {
    const int64_t acc_size = (columns + kTileColumns - 1) / kTileColumns * kTileColumns * ld;
    acc = workspace(acc_size + ld * Layout::depth + Layout::buffer);
    packed = acc + acc_size;
    buffer = packed + ld * Layout::depth;
  }

  void fill(const float* bias) {
    for (int64_t c = 0; c < columns; ++c) std::fill_n(acc + c * ld, ld, bias ? bias[column + c] : 0.f);
  }

  void pack(const Matrix& left, int64_t d, int64_t depth) {
    float* dst = packed;
    for (int64_t r = 0; r < rows;) {
      const int width = next_panel(rows - r).width;
      pack_panel(left, row + r, d, depth, width, rows - r, dst);
      dst += width * depth;
      r += width;
    }
  }

  // dst[depth][width] = left[row .. row + width)[d .. d + depth) transposed
  static void pack_panel(const Matrix& left, int64_t row, int64_t d, int64_t depth, int width, int64_t rows,
                         float* dst) {
    const int64_t first = row * left.ld + d;
    const auto typed = [&](const auto* p) { transpose_to(p + first, left.ld, rows, depth, dst, width, width); };
    if (left.dtype == Dtype::f32) return typed(static_cast<const float*>(left.data));
    if (left.dtype == Dtype::f16) return typed(static_cast<const f16*>(left.data));
    typed(static_cast<const bf16*>(left.data));
  }

  void accumulate(const Term& term) {
    // Slices of equal depth: a short last one would cost as many passes over acc as a full one.
    const int64_t slices = (term.depth + Layout::depth - 1) / Layout::depth;
    const int64_t step = slices ? ((term.depth + slices - 1) / slices + 31) / 32 * 32 : 1;
    for (int64_t d = 0; d < term.depth; d += step) {
      const int64_t depth = std::min(step, term.depth - d);
      pack(term.left, d, depth);
      for (int64_t c = 0; c < columns; c += Layout::group) {
        const int64_t count = std::min<int64_t>(Layout::group, columns - c);
        Layout::read(term.right, column + c, count, d, depth, buffer);
        multiply(depth, c, count);
      }
    }
  }

  void multiply(int64_t depth, int64_t c, int64_t count) {
    const float* left = packed;
    for (int64_t r = 0; r < rows;) {
      const Panel panel = next_panel(rows - r);
      float* out = acc + c * ld + r;
      if (panel.width == Narrow::lanes) {
        panel_tiles<Layout, Narrow, 1>(left, buffer, depth, count, out, ld);
      } else if (panel.vectors == 1) {
        panel_tiles<Layout, Wide, 1>(left, buffer, depth, count, out, ld);
      } else if (panel.vectors == 2) {
        panel_tiles<Layout, Wide, 2>(left, buffer, depth, count, out, ld);
      } else {
        panel_tiles<Layout, Wide, 3>(left, buffer, depth, count, out, ld);
      }
      left += panel.width * depth;
      r += panel.width;
    }
  }

  void write(const MutMatrix& out) const {
    const int64_t first = row * out.ld + column;
    const auto typed = [&](auto* p) { transpose_to(acc, ld, columns, rows, p + first, out.ld, columns); };
    if (out.dtype == Dtype::f32) return typed(static_cast<float*>(out.data));
    if (out.dtype == Dtype::f16) return typed(static_cast<f16*>(out.data));
    typed(static_cast<bf16*>(out.data));
  }
};

// How [rows, columns] is cut into tasks. Packing is shared by a task's columns and decoding by its rows, so large
// tasks are cheap; many tasks keep a stolen core from costing much, and full rounds of them keep all threads busy.
struct Grid {
  int64_t row_step, column_step;
};
template <class Layout>
static Grid choose_grid(int64_t rows, int64_t columns, int threads) {
  // Cycles per decoded and per packed vector, in units of the FMAs they feed.
  constexpr double kDecode = 3, kPack = 16, kTail = 0.1;
  constexpr int64_t kMaxRows = 288, kMaxColumns = 1024;
  Grid best{};
  double best_cost = 0;
  for (int64_t r = (rows + kMaxRows - 1) / kMaxRows; r <= (rows + 63) / 64; ++r) {
    const int64_t row_step = ((rows + r - 1) / r + kLanes - 1) / kLanes * kLanes;
    for (int64_t step = Layout::group; step <= kMaxColumns; step += Layout::group) {
      const int64_t tasks = r * ((columns + step - 1) / step);
      const int64_t rounds = (tasks + threads - 1) / threads;
      const double task = static_cast<double>(row_step * step) * (1 + kDecode / row_step + kPack / step);
      const double cost = task * (threads == 1 ? tasks : rounds + kTail);
      if (best_cost == 0 || cost < best_cost) best_cost = cost, best = {row_step, step};
      if (step >= columns) break;
    }
  }
  return best;
}

template <class Layout, class Function>
static void for_blocks(int64_t rows, int64_t columns, const Function& f) {
  if (rows == 0 || columns == 0) return;
  const Grid grid = choose_grid<Layout>(rows, columns, num_threads());
  const int64_t row_parts = (rows + grid.row_step - 1) / grid.row_step;
  const int64_t column_parts = (columns + grid.column_step - 1) / grid.column_step;
  parallel_chunks(row_parts * column_parts, [&](int64_t task) {
    const int64_t row = task % row_parts * grid.row_step, column = task / row_parts * grid.column_step;
    Block<Layout> block(row, std::min(grid.row_step, rows - row), column, std::min(grid.column_step, columns - column));
    f(block);
  });
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
