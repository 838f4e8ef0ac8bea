// The macro kernel of linear and linear_dx: out [rows, columns] = sum over terms of left [rows, depth] . right.
//
// Tiling. A task owns a block of rows x columns of the output and keeps it, transposed and in fp32, in `acc`. For each
// kDepth slice of the reduction it packs the left operand once (transposed, so that lanes are rows), then decodes the
// weight one column group at a time into a buffer that stays in L1/L2, and runs register tiles over it. Bytes per
// task and slice: the 4-bit weight is read once (columns * kDepth / 2), the left slice once (rows * kDepth * 4), acc
// is read and written once (rows * columns * 8, from L2) for rows * columns * kDepth FMAs. Neither a dequantised
// weight nor a converted activation exists beyond a slice.
#pragma once
#include <algorithm>

#include "../parallel.h"
#include "gemm_micro.h"
#include "rows.h"
#include "workspace.h"

namespace fusetune {
namespace FUSETUNE_ISA {

constexpr int kDepth = 256;
constexpr int kMaxRows = 288;
constexpr int kMaxColumns = 1024;

// A weight row is an output column (forward). Rows are padded so that they do not fall into the same cache sets.
struct RowsAreColumns {
  static constexpr int group = 16, column_stride = kDepth + 16, depth_stride = 1;
  static constexpr int buffer = group * column_stride;
  static void read(const Rows& rows, int64_t column, int64_t columns, int64_t d, int64_t depth, float* dst) {
    rows.read(column, columns, d, depth, dst, column_stride);
  }
};
// A weight row is a step of the reduction (backward).
struct RowsAreDepth {
  static constexpr int group = 64, column_stride = 1, depth_stride = group + 16;
  static constexpr int buffer = kDepth * depth_stride;
  static void read(const Rows& rows, int64_t column, int64_t columns, int64_t d, int64_t depth, float* dst) {
    rows.read(d, depth, column, columns, dst, depth_stride);
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
  const int64_t vectors = (rows + kLanes - 1) / kLanes;
  const int take = vectors == kMaxVectors + 1 ? 2 : static_cast<int>(std::min<int64_t>(vectors, kMaxVectors));
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
    acc = workspace(acc_size + ld * kDepth + Layout::buffer);
    packed = acc + acc_size;
    buffer = packed + ld * kDepth;
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
    for (int64_t d = 0; d < term.depth; d += kDepth) {
      const int64_t depth = std::min<int64_t>(kDepth, term.depth - d);
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

// Calls f(block) for the tasks that [rows, columns] is cut into: enough of them that a stolen core costs little, and
// large enough that packing (shared by a task's columns) and decoding (shared by its rows) stay small.
template <class Layout, class Function>
static void for_blocks(int64_t rows, int64_t columns, const Function& f) {
  if (rows == 0 || columns == 0) return;
  const int64_t row_parts = (rows + kMaxRows - 1) / kMaxRows;
  const int64_t row_step = ((rows + row_parts - 1) / row_parts + kLanes - 1) / kLanes * kLanes;
  const int64_t groups = (columns + Layout::group - 1) / Layout::group;
  const int64_t wanted = (4 * num_threads() + row_parts - 1) / row_parts;
  const int64_t limit = kMaxColumns / Layout::group;
  const int64_t group_step = std::max<int64_t>(1, std::min(limit, groups / wanted));
  const int64_t column_step = group_step * Layout::group;
  const int64_t column_parts = (columns + column_step - 1) / column_step;
  parallel_chunks(row_parts * column_parts, [&](int64_t task) {
    const int64_t row = task % row_parts * row_step, column = task / row_parts * column_step;
    if (row >= rows) return;
    Block<Layout> block(row, std::min(row_step, rows - row), column, std::min(column_step, columns - column));
    f(block);
  });
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
