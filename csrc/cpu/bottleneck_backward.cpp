// Bottleneck adapters, backward: the gradients of x, of the weights and of the biases from dy, x and z.
//
// Tiling: tasks of some hundred rows, which go over them in blocks of 192. For each block dy comes in slices of 144
// columns (16 bits or dropout: in a buffer in L2), from which register tiles add to dz = (du up) f'(z) and to
// d_up = du^T f(z); then x comes in slices for d_down = dz^T x, and dx = dz down (+ dy) is expanded as in the forward
// pass. A task keeps its own sums of the weights' gradients, which are added in order: tasks depend on the shape alone,
// so results do not depend on the number of threads. There are so few tasks that the sums take a quarter of x at most
// (but one per group).
// Bytes: dy and x read once (dy for the residual a second time, from L2 or L3), dx written once, the sums read and
// written once a block (12 FMAs a byte). Floor: 4 M H d FMAs. Measured on one core of a Zen 4 (118 GF/s at its best),
// fp32: M = 4096, H = 768, d = 48: 11.7 ms, floor 10.2; M = 2048, H = 4096, d = 64: 42 ms, floor 36.
#include "bottleneck.h"
#include "isa_kernels.h"

namespace fusetune::FUSETUNE_ISA {

// The sums of a task: up [hidden][ld], down [bottleneck][wide_ld], up_bias [wide_ld], down_bias [ld].
struct Sums {
  int64_t ld, wide_ld;
  float *up, *down, *up_bias, *down_bias;

  static int64_t size(const Adapters& a) {
    const int64_t ld = whole_vectors(a.bottleneck), wide_ld = whole_panels(a.hidden);
    return a.hidden * ld + a.bottleneck * wide_ld + wide_ld + ld;
  }
  Sums(const Adapters& a, float* memory)
      : ld(whole_vectors(a.bottleneck)), wide_ld(whole_panels(a.hidden)), up(memory), down(up + a.hidden * ld),
        up_bias(down + a.bottleneck * wide_ld), down_bias(up_bias + wide_ld) {}
};

// sum [width] (+)= the sum of the rows of v; width is a multiple of kLanes. Three sums at a time hide their latency.
static void add_rows(const float* v, int64_t rows, int64_t ld, int64_t width, bool add_to, float* sum) {
  const auto add_columns = [&](auto vectors, int64_t c) {
    F s[vectors];
    for (int j = 0; j < vectors; ++j) s[j] = add_to ? load(sum + c + j * kLanes) : zero();
    for (int64_t i = 0; i < rows; ++i) {
      for (int j = 0; j < vectors; ++j) s[j] = add(s[j], load(v + i * ld + c + j * kLanes));
    }
    for (int j = 0; j < vectors; ++j) store(sum + c + j * kLanes, s[j]);
  };
  int64_t c = 0;
  for (; c + kPanel <= width; c += kPanel) add_columns(std::integral_constant<int, 3>{}, c);
  for (; c < width; c += kLanes) add_columns(std::integral_constant<int, 1>{}, c);
}

// One block of rows of a task: everything it adds to the sums, and its rows of dx.
struct BackwardBlock {
  const Adapters& adapters;
  const Layouts& layouts;
  const AdapterGradients& out;
  const RowBlock block;
  const Sums sums;
  const bool first;  // of its task: sums are not read
  float *slice = nullptr, *value = nullptr, *dz = nullptr, *slope = nullptr, *scratch = nullptr;

  static int64_t memory(const Adapters& a) {
    return kBlockRows * (kSliceLd + 3 * whole_vectors(a.bottleneck) + kPanel);
  }
  void use(float* memory) {
    slice = memory;
    value = slice + kBlockRows * kSliceLd;
    slope = value + kBlockRows * sums.ld;
    dz = slope + kBlockRows * sums.ld;
    scratch = dz + kBlockRows * sums.ld;
  }
  bool needs_dz() const { return out.dx.data || out.down.data || out.down_bias; }
  Target add_to(float* sum, int64_t ld) const { return {sum, ld, first ? nullptr : sum, ld, nullptr}; }

  // value = f(z), slope = f'(z)
  void activate(const Matrix& z) const {
    with_activation(adapters.activation, [&](const auto& f) {
      for (int64_t i = 0; i < block.rows; ++i) {
        float* const v = value + i * sums.ld;
        load_floats(z.data, z.dtype, (block.row + i) * z.ld, adapters.bottleneck, v);
        for (int64_t k = 0; k < sums.ld; k += kLanes) {
          const ValueAndSlope at = f(load(v + k));
          store(v + k, at.value);
          store(slope + i * sums.ld + k, at.slope);
        }
      }
    });
  }

  // What is read after the slice at `column` of m: the next slice, at last `then`.
  Ahead following(const Matrix& m, int64_t column, const Region& then) const {
    const int64_t next = column + kSlice, hidden = adapters.hidden;
    if (next >= hidden) return Ahead(then);
    return Ahead(region(m, block.row, block.rows, next, std::min(kSlice, hidden - next)));
  }

  void read_dy(const Matrix& dy, const Matrix& x, const Dropout& dropout) const {
    const Region then = region(x, block.row, block.rows, 0, std::min(kSlice, adapters.hidden));
    for (int64_t column = 0; column < adapters.hidden; column += kSlice) {
      const int64_t width = std::min(kSlice, adapters.hidden - column);
      const Slice part = read_slice(dy, block, column, width, adapters.hidden, dropout, slice);
      if (out.up_bias) add_rows(part.data, block.rows, part.ld, whole_vectors(width), !first, sums.up_bias + column);
      Ahead ahead = following(dy, column, then);
      if (needs_dz()) {
        outer({part.data, part.ld, 1}, block.rows, {layouts.tall_row(block.group, column), sums.ld}, sums.ld, width,
              {dz, sums.ld, column ? dz : nullptr, sums.ld, nullptr}, ahead);
      }
      if (out.up.data) {
        outer({part.data, 1, part.ld}, width, {value, sums.ld}, sums.ld, block.rows,
              add_to(sums.up + column * sums.ld, sums.ld), ahead);
      }
    }
  }

  void finish_dz() const {
    for (int64_t i = 0; i < block.rows * sums.ld; i += kLanes) store(dz + i, mul(load(dz + i), load(slope + i)));
    if (out.down_bias) add_rows(dz, block.rows, sums.ld, sums.ld, !first, sums.down_bias);
  }

  void read_x(const Matrix& x, const Matrix& dy, int64_t m, const Matrix& addend) const {
    const int64_t row = block.row + block.rows;
    const Region then = region(dy, row, std::min(kBlockRows, m - row), 0, std::min(kSlice, adapters.hidden));
    for (int64_t column = 0; column < adapters.hidden; column += kSlice) {
      const int64_t width = std::min(kSlice, adapters.hidden - column);
      if (out.down.data) {
        const Slice part = read_slice(x, block, column, width, adapters.hidden, {}, slice);
        Ahead ahead = following(x, column, then);
        outer({dz, 1, sums.ld}, adapters.bottleneck, {part.data, part.ld}, whole_vectors(width), block.rows,
              add_to(sums.down + column, sums.wide_ld), ahead);
      }
      if (out.dx.data) expand(layouts, block, dz, nullptr, {}, addend, out.dx, column, column + width, scratch);
    }
  }
};

// Rows of out, from `first_row`: the sums over `count` parts, `stride` apart, of [rows][ld], in their order.
static void sum_parts(const float* parts, int64_t count, int64_t stride, int64_t rows, int64_t ld, int64_t cols,
                      const MutMatrix& out, int64_t first_row) {
  const int64_t step = std::max<int64_t>(1, 16384 / ld);
  parallel_chunks((rows + step - 1) / step, [&](int64_t task) {
    alignas(64) float sum[kPanel];
    for (int64_t i = task * step; i < std::min(rows, (task + 1) * step); ++i) {
      for (int64_t column = 0; column < cols; column += kPanel) {
        const int64_t width = std::min(kPanel, cols - column);
        for (int64_t c = 0; c < width; c += kLanes) {
          F s = zero();
          for (int64_t p = 0; p < count; ++p) s = add(s, load(parts + p * stride + i * ld + column + c));
          store(sum + c, s);
        }
        store_floats(sum, out.data, out.dtype, (first_row + i) * out.ld + column, width);
      }
    }
  });
}

// Rows of a task: some 8 d of them keep its sums an eighth of its rows of x and of dy each. Two tasks at least where
// there is work for them, and an even number.
static int64_t rows_of_task(int64_t m, int64_t ld) {
  const int64_t rows = std::max(std::max(4 * kBlockRows, 8 * ld), (m + 15) / 16);
  const int64_t tasks = m <= kBlockRows ? 1 : ((m + rows - 1) / rows + 1) / 2 * 2;
  return std::max(kOuterRows, ((m + tasks - 1) / tasks + kOuterRows - 1) / kOuterRows * kOuterRows);
}

void bottleneck_backward(const Matrix& dy, const Matrix& x, const Matrix& z, int64_t m, const Adapters& adapters,
                         const Matrix& addend, const Dropout& dropout, const AdapterGradients& out) {
  const int64_t hidden = adapters.hidden, d = adapters.bottleneck;
  const int64_t layout_size = adapters.groups * Layouts::group_size(adapters), size = Sums::size(adapters);
  const int64_t step = rows_of_task(m, whole_vectors(d)), tasks = count_blocks(adapters, step);
  float* const memory = workspace<Purpose::shared>(layout_size + tasks * size);
  float* const parts = memory + layout_size;
  const Layouts layouts(adapters, memory);
  layouts.fill(adapters, false);

  parallel_chunks(tasks, [&](int64_t task) {
    const RowBlock all = block_at(adapters, task, step);
    float* const own = workspace(BackwardBlock::memory(adapters));
    for (int64_t row = 0; row < all.rows; row += kBlockRows) {
      const RowBlock rows{all.group, all.row + row, std::min(kBlockRows, all.rows - row)};
      BackwardBlock block{adapters, layouts, out, rows, Sums(adapters, parts + task * size), row == 0};
      block.use(own);
      block.activate(z);
      block.read_dy(dy, x, dropout);
      if (!block.needs_dz()) continue;
      block.finish_dz();
      block.read_x(x, dy, m, addend);
    }
  });

  const Sums sums(adapters, parts);
  int64_t first = 0;
  for (int64_t g = 0; g < adapters.groups; ++g) {
    const int64_t count = (adapters.rows[g] + step - 1) / step, skip = first * size;
    if (out.up.data) sum_parts(sums.up + skip, count, size, hidden, sums.ld, d, out.up, g * hidden);
    if (out.down.data) sum_parts(sums.down + skip, count, size, d, sums.wide_ld, hidden, out.down, g * d);
    const MutMatrix up_bias{out.up_bias, hidden, Dtype::f32}, down_bias{out.down_bias, d, Dtype::f32};
    if (up_bias.data) sum_parts(sums.up_bias + skip, count, size, 1, sums.wide_ld, hidden, up_bias, g);
    if (down_bias.data) sum_parts(sums.down_bias + skip, count, size, 1, sums.ld, d, down_bias, g);
    first += count;
  }
}

}  // namespace fusetune::FUSETUNE_ISA
