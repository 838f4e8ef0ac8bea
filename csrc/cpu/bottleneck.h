// What both passes of bottleneck adapters share: blocks of rows, slices of x, weights laid out for outer.h.
#pragma once
#include <algorithm>

#include "../parallel.h"
#include "activation.h"
#include "convert.h"
#include "dropout.h"
#include "gemm.h"
#include "outer.h"
#include "workspace.h"

namespace fusetune::FUSETUNE_ISA {

constexpr int64_t kBlockRows = 192;       // of x at a time
constexpr int64_t kSlice = 144;           // columns of x at a time, whole panels
constexpr int64_t kSliceLd = kSlice + 16;  // rows of a slice do not fall into the same cache sets

static inline int64_t whole_panels(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

struct RowBlock {
  int64_t group, row, rows;
};

// Each group's rows cut into blocks of `step`.
static inline int64_t count_blocks(const Adapters& adapters, int64_t step) {
  int64_t blocks = 0;
  for (int64_t g = 0; g < adapters.groups; ++g) blocks += (adapters.rows[g] + step - 1) / step;
  return blocks;
}
static inline RowBlock block_at(const Adapters& adapters, int64_t index, int64_t step) {
  int64_t row = 0;
  for (int64_t g = 0;; ++g) {
    const int64_t blocks = (adapters.rows[g] + step - 1) / step;
    if (index < blocks) return {g, row + index * step, std::min(step, adapters.rows[g] - index * step)};
    index -= blocks;
    row += adapters.rows[g];
  }
}

template <class Function>
static void with_storage(const Matrix& m, const Function& f) {
  if (m.dtype == Dtype::f32) return f(static_cast<const float*>(m.data));
  if (m.dtype == Dtype::f16) return f(static_cast<const f16*>(m.data));
  f(static_cast<const bf16*>(m.data));
}

// Weights of all groups in fp32, for products over the hidden size (tall: [hidden][whole vectors of bottleneck]) and
// over the bottleneck (wide: panels [bottleneck][kPanel]). Padding is zero.
struct Layouts {
  int64_t hidden, bottleneck, tall_ld, size;
  float *tall, *wide;

  static int64_t group_size(const Adapters& a) {
    return a.hidden * whole_vectors(a.bottleneck) + whole_panels(a.hidden) * a.bottleneck;
  }

  Layouts(const Adapters& a, float* memory)
      : hidden(a.hidden), bottleneck(a.bottleneck), tall_ld(whole_vectors(a.bottleneck)), size(group_size(a)),
        tall(memory), wide(memory + hidden * tall_ld) {}

  const float* tall_row(int64_t group, int64_t column) const { return tall + group * size + column * tall_ld; }
  const float* panel(int64_t group, int64_t column) const { return wide + group * size + column * bottleneck; }

  // Forward: tall holds down [bottleneck, hidden], wide holds up [hidden, bottleneck]. Backward: the other way round.
  void fill(const Adapters& a, bool forward) const {
    const int64_t panels = (hidden + kPanel - 1) / kPanel;
    parallel_chunks(a.groups * panels, [&](int64_t task) {
      const int64_t group = task / panels, column = task % panels * kPanel;
      const int64_t columns = std::min(kPanel, hidden - column);
      float* const rows = tall + group * size + column * tall_ld;
      float* const panel = wide + group * size + column * bottleneck;
      const int64_t down = group * bottleneck * hidden + column, up = (group * hidden + column) * bottleneck;
      if (forward) {
        with_storage(a.down, [&](const auto* p) {
          transpose_to(p + down, hidden, bottleneck, columns, rows, tall_ld, tall_ld);
        });
        with_storage(a.up, [&](const auto* p) {
          transpose_to(p + up, bottleneck, columns, bottleneck, panel, kPanel, kPanel);
        });
        return;
      }
      for (int64_t c = 0; c < columns; ++c) {
        load_floats(a.up.data, a.up.dtype, up + c * bottleneck, bottleneck, rows + c * tall_ld);
      }
      for (int64_t k = 0; k < bottleneck; ++k) {
        load_floats(a.down.data, a.down.dtype, down + k * hidden, columns, panel + k * kPanel);
        std::fill(panel + k * kPanel + whole_vectors(columns), panel + (k + 1) * kPanel, 0.f);
      }
    });
  }
};

// Elements [column, column + width) of rows of a matrix, to be asked for ahead. None where there are no such rows.
static inline Region region(const Matrix& m, int64_t row, int64_t rows, int64_t column, int64_t width) {
  if (!m.data || rows <= 0) return {};
  const int64_t size = m.dtype == Dtype::f32 ? 4 : 2;
  const char* first = static_cast<const char*>(m.data) + (row * m.ld + column) * size;
  return {first, m.ld * size, rows, (width * size + 63) / 64};
}
static inline Matrix read_only(const MutMatrix& m) { return {m.data, m.ld, m.dtype}; }

// A slice of a matrix in fp32, with whole vectors that may be read.
struct Slice {
  const float* data;
  int64_t ld;
};

// Elements [column, column + width) of rows of x, dropped out: in place where that can be, else copied to `buffer`.
static inline Slice read_slice(const Matrix& x, const RowBlock& block, int64_t column, int64_t width, int64_t hidden,
                               const Dropout& dropout, float* buffer) {
  const bool in_place = x.dtype == Dtype::f32 && width % kLanes == 0 && dropout.threshold == 0;
  if (in_place) return {static_cast<const float*>(x.data) + block.row * x.ld + column, x.ld};
  for (int64_t i = 0; i < block.rows; ++i) {
    float* const to = buffer + i * kSliceLd;
    load_floats(x.data, x.dtype, (block.row + i) * x.ld + column, width, to);
    apply_dropout(dropout, (block.row + i) * hidden + column, width, to);
  }
  return {buffer, kSliceLd};
}

// Row `row` of out, from `column`: v [width], dropped out, plus the addend. v is changed.
static inline void finish_row(float* v, int64_t row, int64_t column, int64_t width, int64_t hidden, const Dropout& drop,
                              const Matrix& addend, const MutMatrix& out) {
  apply_dropout(drop, row * hidden + column, width, v);
  if (addend.data) {
    alignas(64) float other[kPanel];
    load_floats(addend.data, addend.dtype, row * addend.ld + column, width, other);
    for (int64_t c = 0; c < width; c += kLanes) store(v + c, add(load(v + c), load(other + c)));
  }
  store_floats(v, out.data, out.dtype, row * out.ld + column, width);
}

// out [rows, hidden] = left [rows, bottleneck] . wide (+ bias), dropped out, plus the addend. scratch: rows x kPanel.
static inline void expand(const Layouts& layouts, const RowBlock& block, const float* left, const float* bias,
                          const Dropout& drop, const Matrix& addend, const MutMatrix& out, int64_t column, int64_t end,
                          float* scratch) {
  const Scalars scalars{left, layouts.tall_ld, 1};
  const bool plain = drop.threshold == 0 && out.dtype == Dtype::f32 && (!addend.data || addend.dtype == Dtype::f32);
  for (; column < end; column += kPanel) {
    const int64_t width = std::min(kPanel, end - column);
    const float* const init = bias ? bias + column : nullptr;
    const Vectors vectors{layouts.panel(block.group, column), kPanel};
    const int64_t next = std::min(kPanel, layouts.hidden - column - kPanel);
    const int64_t next_rows = next > 0 ? block.rows : 0;
    Ahead ahead(region(read_only(out), block.row, next_rows, column + kPanel, next),
                region(addend, block.row, next_rows, column + kPanel, next));
    if (plain && width == kPanel) {
      const auto* base = static_cast<const float*>(addend.data);
      if (base) base += block.row * addend.ld + column;
      float* const to = static_cast<float*>(out.data) + block.row * out.ld + column;
      outer(scalars, block.rows, vectors, kPanel, layouts.bottleneck, {to, out.ld, base, addend.ld, init}, ahead);
      continue;
    }
    outer(scalars, block.rows, vectors, kPanel, layouts.bottleneck, {scratch, kPanel, nullptr, 0, init}, ahead);
    for (int64_t i = 0; i < block.rows; ++i) {
      finish_row(scratch + i * kPanel, block.row + i, column, width, layouts.hidden, drop, addend, out);
    }
  }
}

}  // namespace fusetune::FUSETUNE_ISA
