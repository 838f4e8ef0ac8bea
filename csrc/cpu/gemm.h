// The macro kernel of linear and linear_dx: out [rows, columns] = sum over terms of left [rows, depth] . right.
//
// Tiling. A task owns a block of rows x columns of the output and keeps it, transposed and in fp32, in `acc`. For
// each slice of the reduction it packs the left operand once (transposed, so that lanes are rows), then decodes the
// weight one column group at a time into a buffer that stays in L1/L2 (on x86 while the group before it is
// multiplied; not at all in look_up.h), and runs register tiles over it. Bytes per task and slice: the 4-bit weight
// is read once (columns * depth / 2), the left slice once (rows * depth * 4), acc is read and written once (rows *
// columns * 8, from L2) for rows * columns * depth FMAs. Neither a dequantised weight nor a converted activation
// exists beyond a slice, but for a few rows, packed once for all tasks.
#pragma once
#include <algorithm>
#include <type_traits>
#include <utility>

#include "../parallel.h"
#include "gemm_layout.h"
#include "gemm_panels.h"
#include "rows.h"
#include "workspace.h"

namespace fusetune {
namespace FUSETUNE_ISA {

struct Term {
  Matrix left;  // [rows, depth]
  Rows right;
  int64_t depth;
  const float* packed = nullptr;  // left, where share_left has packed it
};

// What a group of columns asks for while it is decoded: the group so many later.
constexpr int64_t kGroupsAhead = 2;

static inline int64_t whole_vectors(int64_t rows) { return (rows + kLanes - 1) / kLanes * kLanes; }

// Slices of equal depth: a short last one would cost as many passes over acc as a full one.
template <class Layout>
static int64_t slice_depth(int64_t depth) {
  const int64_t slices = std::max<int64_t>(1, (depth + Layout::depth - 1) / Layout::depth);
  return std::max<int64_t>(kRun, ((depth + slices - 1) / slices + kRun - 1) / kRun * kRun);
}

// Few rows are packed once for all tasks, which can then be small, and many. Up to kPackedAlone of them by the caller
// alone, since waking the other threads takes as long. The slice at d begins at d * whole_vectors(rows) / elements. Null
// for more rows: each task packs its own, and no copy of `left` exists.
constexpr int64_t kPackedAlone = 64, kSharedRows = kLanes == 16 ? 144 : 64;
template <template <class> class Layout, class Elements>
static const float* share_left(const Matrix& left, int64_t rows, int64_t depth, const Rows& right) {
  if (rows > kSharedRows) return nullptr;
  const bool looks_up = Layout<Elements>::looks_up(right, rows, depth);
  float* packed = workspace<Purpose::shared>(whole_vectors(rows) * depth);
  const int64_t step = slice_depth<Layout<Elements>>(depth);
  const auto pack_slice = [&](int64_t slice) {
    const int64_t d = slice * step;
    pack<Elements>(left, 0, rows, d, std::min(step, depth - d), looks_up,
                   packed + d * whole_vectors(rows) / Elements::WideVec::elements);
  };
  const int64_t slices = (depth + step - 1) / step;
  if (rows > kPackedAlone) {
    parallel_chunks(slices, pack_slice);
  } else {
    for (int64_t slice = 0; slice < slices; ++slice) pack_slice(slice);
  }
  return packed;
}

// One task's block of the output, transposed: acc [columns][ld].
template <template <class> class Layout>
struct Block {
  using Widest = Layout<Floats>;  // what the parts of the workspace must hold
  int64_t row, rows, column, columns;
  int64_t ld;                                  // rows rounded up to whole vectors
  float *acc, *packed, *buffer, *next_buffer;  // parts of the workspace

  Block(int64_t row, int64_t rows, int64_t column, int64_t columns)
      : row(row), rows(rows), column(column), columns(columns), ld(whole_vectors(rows)) {
    const int64_t acc_size = (columns + std::max(kMaxTileColumns, kLanes)) * ld;  // the last tile may be wider
    acc = workspace(acc_size + ld * Widest::depth + (kDecodesBeside ? 2 : 1) * Widest::buffer);
    packed = acc + acc_size;
    buffer = packed + ld * Widest::depth;
    next_buffer = buffer + (kDecodesBeside ? Widest::buffer : 0);
  }

  void fill(const float* bias) {
    for (int64_t c = 0; c < columns; ++c) std::fill_n(acc + c * ld, ld, bias ? bias[column + c] : 0.f);
  }

  template <class Elements>
  void accumulate(const Term& term) {
    using Weights = Layout<Elements>;
    if (term.packed && Weights::looks_up(term.right, rows, term.depth)) return look_up<Weights>(term);
    const int64_t step = slice_depth<Weights>(term.depth);
    bool decoded = false;  // this group, beside the one before it
    for (int64_t d = 0; d < term.depth; d += step) {
      const int64_t depth = std::min(step, term.depth - d);
      if (!term.packed) pack<Elements>(term.left, row, rows, d, depth, false, packed);
      const float* left = term.packed ? term.packed + d * ld / Weights::elements : packed;
      for (int64_t c = 0; c < columns; c += Weights::group) {
        if (const float* in_place = Weights::in_place(term.right, rows, column + c, group_size(c), d)) {
          Nothing nothing;
          multiply_panels<Elements>(left, in_place, RowStrides{term.right.ld}, depth, c, nothing);
          continue;
        }
        if (!decoded) Weights::read(term.right, column + c, group_size(c), d, depth, buffer);
        const Place next = after<Weights>({c, d}, 1, step, term.depth);
        decoded = next.c < columns && next.d + depth <= term.depth && group_size(next.c) == Weights::group &&
                  Weights::can_decode_beside(term.right, column + next.c, next.d, depth) &&
                  !Weights::in_place(term.right, rows, column + next.c, group_size(next.c), next.d);
        const Place later = after<Weights>(next, kGroupsAhead, step, term.depth);
        multiply<Elements>(left, depth, c, term.right, decoded, next, later);
        if (decoded) std::swap(buffer, next_buffer);
      }
    }
  }

  // accumulate, without a buffer of decoded weights, of rows that were packed once for all tasks.
  template <class Weights>
  void look_up(const Term& term) {
    const int64_t step = slice_depth<Weights>(term.depth);
    const auto tiles = term.right.quantized->absmax_q ? look_up_tiles<true> : look_up_tiles<false>;
    for (int64_t d = 0; d < term.depth; d += step) {
      const auto first = static_cast<uint64_t>(column * term.right.ld + d);
      tiles(term.packed + d * ld, term.right, first, std::min(step, term.depth - d), columns, acc, ld);
    }
  }

  int64_t group_size(int64_t c) const { return std::min<int64_t>(Widest::group, columns - c); }

  // A group of columns, from the task's first one counted, in a slice of the reduction.
  struct Place {
    int64_t c, d;
  };
  // The group that is multiplied `count` groups after `at`; behind the last slice, columns behind the task's.
  template <class Weights>
  Place after(Place at, int64_t count, int64_t step, int64_t depth) const {
    const int64_t whole = (columns + Weights::group - 1) / Weights::group * Weights::group;
    at.c += count * Weights::group;
    for (; at.c >= columns && at.d + step < depth; at.d += step) at.c -= whole;
    if (at.c >= columns) at.d = 0;
    return at;
  }

  // acc of the group of columns at c += left . buffer. With `decode` the first tiles decode the group at `next` into
  // next_buffer, and ask for the one at `later`.
  template <class Elements>
  void multiply(const float* left, int64_t depth, int64_t c, const Rows& right, bool decode, const Place& next,
                [[maybe_unused]] const Place& later) {
    using Weights = Layout<Elements>;
    const int64_t first = column + next.c;
    const int64_t floats = depth / Weights::elements;
    const auto run = [&](auto beside) {
      multiply_panels<Elements>(left, buffer, typename Weights::Strides{}, floats, c, beside);
      if constexpr (!std::is_same_v<decltype(beside), Nothing>) decode_rest(beside, floats);
    };
#if defined(FUSETUNE_ISA_AVX2)
    if (decode && !right.quantized) {
      if (right.dtype == Dtype::f32) return run(Weights::template copy_beside<float>(right, first, next.d, depth, next_buffer));
      if (right.dtype == Dtype::f16) return run(Weights::template copy_beside<f16>(right, first, next.d, depth, next_buffer));
      return run(Weights::template copy_beside<bf16>(right, first, next.d, depth, next_buffer));
    }
#endif
    if constexpr (kDecodesBeside) {
      const auto ahead = static_cast<uint64_t>(Weights::element(right, column + later.c, later.d) -
                                               Weights::element(right, first, next.d));
      if (decode && right.quantized->absmax_q) {
        return run(Weights::template decode_beside<true>(right, first, next.d, depth, next_buffer, ahead));
      }
      if (decode) return run(Weights::template decode_beside<false>(right, first, next.d, depth, next_buffer, ahead));
    }
    run(Nothing{});
  }

  template <class Elements, class Strides, class Beside>
  void multiply_panels(const float* left, const float* right, const Strides& strides, int64_t floats, int64_t c,
                       Beside& beside) {
    for (int64_t r = 0; r < rows;) {
      const Panel panel = next_panel(rows - r);
      float* const sums = acc + c * ld + r;
      multiply_panel<Elements>(panel, left, right, strides, floats, group_size(c), sums, ld, beside);
      left += panel.width * floats;
      r += panel.width;
    }
  }

  // What too few tiles have left.
  template <class Beside>
  static void decode_rest(Beside& beside, int64_t floats) {
    for (; beside.tiles > 0; --beside.tiles) {
      for (int64_t d = 0; d < floats; d += Beside::kParts * Beside::kEvery) beside.step(beside.cursor, [] {});
    }
  }

  // acc += what `out` holds, turned over in the buffer.
  void add(const MutMatrix& out) {
    const int64_t span = std::max<int64_t>(kLanes, Widest::buffer / ld / kLanes * kLanes);
    for (int64_t c = 0; c < columns; c += span) {
      const int64_t width = std::min(span, columns - c), first = row * out.ld + column + c;
      const auto typed = [&](const auto* p) { transpose_to(p + first, out.ld, rows, width, buffer, ld, ld); };
      if (out.dtype == Dtype::f32) {
        typed(static_cast<const float*>(out.data));
      } else if (out.dtype == Dtype::f16) {
        typed(static_cast<const f16*>(out.data));
      } else {
        typed(static_cast<const bf16*>(out.data));
      }
      float* sums = acc + c * ld;
      for (int64_t i = 0; i < width * ld; i += kLanes) {
        store(sums + i, FUSETUNE_ISA::add(load(sums + i), load(buffer + i)));
      }
    }
  }

  void write(const MutMatrix& out) const {
    const int64_t first = row * out.ld + column;
    // Along the rows of `out`: down its columns each line would be in another page.
    const auto typed = [&](auto* p) {
      for (int64_t r = 0; r < rows; r += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, rows - r);
        transpose_to(acc + r, ld, columns, count, p + first + r * out.ld, out.ld, columns);
      }
    };
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
  // In units of FMAs with one operand's vector: decoding an element of the weight, packing one of left, and what each
  // slice of a task takes to get going, for each row.
  constexpr bool kWide = kLanes == 16;
  const double kDecode = kWide ? 3 : kDecodesBeside ? 1 : 3, kPack = rows <= kSharedRows ? 0 : kWide ? 24 : 16;
  const double kStart = kWide ? 12 : 0, kTail = 0.1;
  // With 16 lanes a slice of 144 packed rows leaves half of a 1 MB L2 free; 288 would fill it.
  constexpr int64_t kMaxRows = kWide ? 144 : kLanes == 8 ? 192 : 288, kMaxColumns = kWide ? 2048 : 1024;
  constexpr int64_t kMinColumns = (128 + Layout::group - 1) / Layout::group * Layout::group;
  Grid best{};
  double best_cost = 0;
  const int64_t most_parts = rows <= kSharedRows ? 1 : (rows + 63) / 64;  // what is packed once is one block high
  for (int64_t r = (rows + kMaxRows - 1) / kMaxRows; r <= most_parts; ++r) {
    const int64_t row_step = ((rows + r - 1) / r + kLanes - 1) / kLanes * kLanes;
    for (int64_t step = kMinColumns; step <= kMaxColumns; step += Layout::group) {  // whole groups
      const int64_t tasks = r * ((columns + step - 1) / step);
      const int64_t rounds = (tasks + threads - 1) / threads;
      const double task = static_cast<double>(row_step * step) * (1 + kDecode / row_step + (kPack + kStart) / step);
      const double cost = task * (threads == 1 ? tasks : rounds + kTail);
      if (best_cost == 0 || cost < best_cost) best_cost = cost, best = {row_step, step};
      if (step >= columns) break;
    }
  }
  return best;
}

template <template <class> class Layout, class Function>
static void for_blocks(int64_t rows, int64_t columns, const Function& f) {
  if (rows == 0 || columns == 0) return;
  const Grid grid = choose_grid<Layout<Floats>>(rows, columns, num_threads());
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
