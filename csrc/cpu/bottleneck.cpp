// Bottleneck adapters, forward: z = x down^T + down_bias, y = addend + drop(f(z) up^T + up_bias).
//
// Tiling: tasks of up to 192 rows. x comes in slices of 144 columns (16 bits: widened into a buffer in L2, 123 KB), which
// register tiles multiply into z; f(z) stays in L1/L2 and is expanded a panel of 3 vectors of columns at a time, each
// panel of the weight (9 KB at d = 48) for all rows. What comes next is asked for while a product is made: without that
// the memory waits for the FMAs and they for it. Weights are laid out once a call.
// Bytes: x and the addend read once (where they are the same matrix, the second time from L2 or L3), y written once, z
// written. Floor: 2 M H d FMAs. Measured on one core of a Zen 4 (118 GF/s at its best), fp32, with a residual:
// M = 4096, H = 768, d = 48: 6.0 ms, floor 5.1; M = 2048, H = 4096, d = 64: 22.3 ms, floor 18.2. The gap: short tiles
// (d steps between 24 loads and stores) and memory.
#include "bottleneck.h"
#include "isa_kernels.h"

namespace fusetune::FUSETUNE_ISA {

// z: pre-activations without bias, which is added; stored as `out`, then replaced by f(z).
static void activate_rows(const RowBlock& block, const float* bias, Activation kind, int64_t bottleneck, int64_t ld,
                          float* z, const MutMatrix& out) {
  with_activation(kind, [&](const auto& f) {
    for (int64_t i = 0; i < block.rows; ++i, z += ld) {
      for (int64_t k = 0; k < ld; k += kLanes) store(z + k, add(load(z + k), load(bias + k)));
      store_floats(z, out.data, out.dtype, (block.row + i) * out.ld, bottleneck);
      for (int64_t k = 0; k < ld; k += kLanes) store(z + k, f(load(z + k)).value);
    }
  });
}

// A bias of all groups [groups, n], or zeros, each group's padded to ld.
static void pad_bias(const float* bias, int64_t groups, int64_t n, int64_t ld, float* out) {
  std::fill_n(out, groups * ld, 0.f);
  if (!bias) return;
  for (int64_t g = 0; g < groups; ++g) std::copy_n(bias + g * n, n, out + g * ld);
}

void bottleneck(const Matrix& x, int64_t m, const Adapters& adapters, const Matrix& addend, const Dropout& dropout,
                const MutMatrix& y, const MutMatrix& z) {
  const int64_t hidden = adapters.hidden, groups = adapters.groups;
  const int64_t layout_size = groups * Layouts::group_size(adapters);
  const int64_t ld = whole_vectors(adapters.bottleneck), bias_ld = whole_panels(hidden);
  float* const memory = workspace<Purpose::shared>(layout_size + groups * (ld + bias_ld));
  const Layouts layouts(adapters, memory);
  layouts.fill(adapters, true);
  float* const down_bias = memory + layout_size;
  float* const up_bias = down_bias + groups * ld;
  pad_bias(adapters.down_bias, groups, adapters.bottleneck, ld, down_bias);
  pad_bias(adapters.up_bias, groups, hidden, bias_ld, up_bias);

  int64_t step = kBlockRows;
  while (step > kOuterRows && m < 2 * step * num_threads()) step /= 2;
  parallel_chunks(count_blocks(adapters, step), [&](int64_t task) {
    const RowBlock block = block_at(adapters, task, step);
    float* const slice = workspace(step * (kSliceLd + ld + kPanel));
    float* const low = slice + step * kSliceLd;
    float* const scratch = low + step * ld;
    for (int64_t column = 0; column < hidden; column += kSlice) {
      const int64_t width = std::min(kSlice, hidden - column);
      const Slice part = read_slice(x, block, column, width, hidden, {}, slice);
      const int64_t next = column + kSlice, next_row = block.row + block.rows;
      Ahead ahead(next < hidden ? region(x, block.row, block.rows, next, std::min(kSlice, hidden - next))
                                : region(x, next_row, std::min(step, m - next_row), 0, std::min(kSlice, hidden)));
      outer({part.data, part.ld, 1}, block.rows, {layouts.tall_row(block.group, column), ld}, ld, width,
            {low, ld, column ? low : nullptr, ld, nullptr}, ahead);
    }
    activate_rows(block, down_bias + block.group * ld, adapters.activation, adapters.bottleneck, ld, low, z);
    expand(layouts, block, low, up_bias + block.group * bias_ld, dropout, addend, y, 0, hidden, scratch);
  });
}

}  // namespace fusetune::FUSETUNE_ISA
