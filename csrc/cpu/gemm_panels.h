// Panels of the macro kernel of gemm.h: the rows of the left operand that one register tile takes, packed for it.
//
// Tiling. A panel is 1 to 3 vectors of rows, transposed so that lanes are rows: [depth][lanes]. Bytes: a panel is read
// and written once (8 bytes an element), then read from L1/L2 by the tiles of every column group.
#pragma once
#include <algorithm>
#include <type_traits>

#include "gemm_layout.h"

namespace fusetune {
namespace FUSETUNE_ISA {

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

// A panel is the rows that one tile takes: 1 to kMaxVectors vectors, or one narrow vector; or the one of look_up.h.
struct Panel {
  int vectors, width;
};
static inline Panel next_panel(int64_t rows, bool looks_up = false) {
  if (looks_up) return {kLookUpVectors, kLookUpVectors * kLanes};
  if (rows <= Narrow::lanes) return {1, Narrow::lanes};
  // A rest that fits a narrow vector is left for one.
  const int64_t left_over = Narrow::lanes < kLanes ? Narrow::lanes : 0;
  const int64_t vectors = (rows - left_over + kLanes - 1) / kLanes;
  // With 16 registers a tile of one vector is the slowest: it loads as much as it multiplies.
  const bool would_leave_one = kMaxTileColumns > 8 && vectors % kMaxVectors == 1 && vectors > 1;
  const int take = would_leave_one ? 2 : static_cast<int>(std::min<int64_t>(vectors, kMaxVectors));
  return {take, take * kLanes};
}

template <class Vec, int vectors, class Strides, class Beside>
static void panel_tiles(const float* left, const float* right, const Strides& strides, int64_t depth, int64_t columns,
                        float* acc, int64_t ld, Beside& beside) {
  constexpr int wide = tile_columns(vectors), narrow = kMinTileColumns;
  const auto run = [&](auto width, int64_t c) {
    const auto with = [&](auto& what) {
      tile<Vec, vectors, width>(left, right + c * strides.column, strides, depth, acc + c * ld, ld, what);
      return static_cast<int>(width);
    };
    if constexpr (!std::is_same_v<Beside, Nothing>) {
      if (beside.tiles > 0) {
        --beside.tiles;
        return with(beside);
      }
    }
    Nothing nothing;
    return with(nothing);
  };
  for (int64_t c = 0; c < columns;) {
    c += columns - c > narrow ? run(std::integral_constant<int, wide>{}, c)
                              : run(std::integral_constant<int, narrow>{}, c);
  }
}

// The panel's rows against a group of columns; depth in floats.
template <class Elements, class Strides, class Beside>
static void multiply_panel(const Panel& panel, const float* left, const float* right, const Strides& strides,
                           int64_t depth, int64_t columns, float* acc, int64_t ld, Beside& beside) {
  using Vec = typename Elements::WideVec;
  if (panel.width == Narrow::lanes) {
    return panel_tiles<typename Elements::NarrowVec, 1>(left, right, strides, depth, columns, acc, ld, beside);
  }
  if (panel.vectors == 1) return panel_tiles<Vec, 1>(left, right, strides, depth, columns, acc, ld, beside);
  if (panel.vectors == 2) return panel_tiles<Vec, 2>(left, right, strides, depth, columns, acc, ld, beside);
  panel_tiles<Vec, 3>(left, right, strides, depth, columns, acc, ld, beside);
}

// dst[panel][depth / elements][width] = left[row .. row + rows)[d .. d + depth), each panel transposed
template <class Elements>
static void pack(const Matrix& left, int64_t row, int64_t rows, int64_t d, int64_t depth, bool looks_up,
                 float* dst) {
  for (int64_t r = 0; r < rows;) {
    const int width = next_panel(rows - r, looks_up).width;
    const int64_t first = (row + r) * left.ld + d;
    const auto typed = [&](const auto* p) { transpose_to(p + first, left.ld, rows - r, depth, dst, width, width); };
    if constexpr (Elements::WideVec::elements == 2) {
      const auto* pairs = reinterpret_cast<const float*>(static_cast<const bf16*>(left.data) + first);
      transpose_to(pairs, left.ld / 2, rows - r, depth / 2, dst, width, width);
    } else if (left.dtype == Dtype::f32) {
      typed(static_cast<const float*>(left.data));
    } else if (left.dtype == Dtype::f16) {
      typed(static_cast<const f16*>(left.data));
    } else {
      typed(static_cast<const bf16*>(left.data));
    }
    dst += width * depth / Elements::WideVec::elements;
    r += width;
  }
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
