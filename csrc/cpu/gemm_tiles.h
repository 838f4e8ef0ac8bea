// The macro kernels of linear and linear_dx on AMX: x in bf16, a 4-bit weight rounded to bf16, sums in fp32.
//
// Tiling. x (or dy), up to 512 rows of it, is packed into tiles once for all tasks. A task owns a block of columns of
// the output for those rows and keeps its sums in L2. For each slice of the reduction (256 deep) it decodes 32 columns
// of the weight into 16 tiles, 16 KB that stay in L1, and multiplies them by all rows, 2 x 2 tiles at a time: four tiles
// are loaded for four products of 16 cycles each, two of them from L2.
//
// Bytes per task: columns * K / 2 of codes from memory, the packed rows once (2 K bytes a row) from L3, and for each
// slice 8 bytes for each sum from L2. Cycles, counted by ports: 16 for a product of 8192 FMAs, and 48 (forward) or 64
// (backward) to decode a tile of the weight, which its products with 16 rows each share: up to 48 rows decoding takes
// longer than multiplying, at 512 it is a tenth.
#pragma once
#include "dropout.h"
#include "float_rows.h"
#include "gemm.h"
#include "isa/amx.h"
#include "outer.h"

namespace fusetune {
namespace FUSETUNE_ISA {

// Rows of codes begin on whole tiles, so that no block of a quantised weight ends within one.
static inline bool tiles_fit(const Matrix& left, int64_t rows, const Weight& w) {
  return left.dtype == Dtype::bf16 && w.quantized && w.quantized->cols % kTileDepth == 0 && rows > 0;
}

// `rows` rows of the left operand at a time, `columns` of the output to a task.
struct TileGrid {
  int64_t rows, columns;
};
static inline TileGrid tile_grid(int64_t rows, int64_t columns) {
  constexpr int64_t kMostRows = 512, kMostSums = 1 << 18, kTasksPerThread = 4;
  const int64_t parts = (rows + kMostRows - 1) / kMostRows, each = (rows + parts - 1) / parts;
  const int64_t row_step = (each + 2 * kTile - 1) / (2 * kTile) * (2 * kTile);
  const int64_t wanted = columns / (kTasksPerThread * num_threads());
  const int64_t step = std::max<int64_t>(2 * kTile, std::min(wanted, kMostSums / row_step));
  return {row_step, (step + 2 * kTile - 1) / (2 * kTile) * (2 * kTile)};
}

static inline int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }
constexpr int64_t kSliceTiles = 8;  // of the reduction
constexpr int64_t kGroupColumns = 2 * kTile, kGroupElements = 2 * kSliceTiles * kTileElements;
constexpr int64_t kLineColumns = 128;  // whose codes share a cache line

// The reduction in slices of equal depth, in tiles.
struct Slices {
  int64_t steps, each;
  explicit Slices(int64_t depth) : steps((depth + kTileDepth - 1) / kTileDepth) {
    const int64_t count = std::max<int64_t>(1, (steps + kSliceTiles - 1) / kSliceTiles);
    each = std::max<int64_t>(1, (steps + count - 1) / count);
  }
  int64_t size(int64_t s) const { return std::min(each, steps - s); }
};

// Packed rows: [slice][tile of rows][tile of the slice], since what a slice needs must not lie a power of two apart,
// where it would fall into the same few sets of the cache.
static inline int64_t packed_at(const Slices& slices, int64_t row_tiles, int64_t t, int64_t s) {
  return (s * row_tiles + t * slices.size(s)) * kTileElements;
}

// Calls pack(t, s, to) for all tiles of packed rows; a few by the caller alone, since waking the other threads takes as
// long.
template <class Function>
static void pack_tiles(const Slices& slices, int64_t row_tiles, bf16* packed, const Function& pack) {
  const auto pack_rows = [&](int64_t t) {
    for (int64_t s = 0; s < slices.steps; s += slices.each) {
      bf16* to = packed + packed_at(slices, row_tiles, t, s);
      for (int64_t i = 0; i < slices.size(s); ++i) pack(t, s + i, to + i * kTileElements);
    }
  };
  if (row_tiles * kTile > kPackedAlone) return parallel_chunks(row_tiles, pack_rows);
  for (int64_t t = 0; t < row_tiles; ++t) pack_rows(t);
}

// 16 rows of x [rows, depth] as the tile of a left operand at `step`; zeros in the padding.
static inline void pack_left_tile(const Matrix& x, int64_t row, int64_t rows, int64_t depth, int64_t step, bf16* to) {
  const int64_t count = std::min(kTileDepth, depth - step * kTileDepth);
  const auto lanes = static_cast<__mmask32>((uint64_t{1} << count) - 1);
  const bf16* from = static_cast<const bf16*>(x.data) + row * x.ld + step * kTileDepth;
  for (int64_t r = 0; r < kTile; ++r, from += x.ld) {
    store_words(to + r * kTileDepth, _mm512_maskz_loadu_epi16(row + r < rows ? lanes : 0, from));
  }
}

// The same, turned over, as the tile of a right operand, whose columns are rows of x. Its depth is whole tiles.
static inline void pack_right_tile(const Matrix& x, int64_t row, int64_t rows, int64_t step, bf16* to) {
  const bf16* from = static_cast<const bf16*>(x.data) + row * x.ld + step * kTileDepth;
  F pairs[kTile];
  for (int64_t r = 0; r < kTile; ++r, from += x.ld) {
    pairs[r] = row + r < rows ? load(reinterpret_cast<const float*>(from)) : zero();
  }
  transpose(pairs);
  for (int64_t r = 0; r < kTile; ++r) store(reinterpret_cast<float*>(to) + r * kTile, pairs[r]);
}

// Calls multiply_tiles for one or two tiles either way.
static inline void multiply_up_to_2x2(int64_t rows, int64_t columns, const bf16* a, const bf16* b, int64_t steps,
                                      int64_t next, float* c, int64_t ld) {
  if (rows > 1 && columns > 1) return multiply_tiles<2, 2>(a, b, next, steps, c, ld);
  if (rows > 1) return multiply_tiles<2, 1>(a, b, next, steps, c, ld);
  if (columns > 1) return multiply_tiles<1, 2>(a, b, next, steps, c, ld);
  multiply_tiles<1, 1>(a, b, next, steps, c, ld);
}

// Calls f(first column of a group, first tile of a slice) for all of a task.
template <class Function>
static void for_groups(int64_t columns, const Slices& slices, const Function& f) {
  for (int64_t s = 0; s < slices.steps; s += slices.each) {
    for (int64_t c = 0; c < columns; c += kGroupColumns) f(c, s);
  }
}

// y = x . W^T: the weight is the left operand, so sums are transposed, [columns][rows], as gemm.h's are.
static inline void linear_tiles(const Matrix& x, int64_t m, int64_t n, int64_t k, const Weight& w, const float* bias,
                         const Term& low_rank, const MutMatrix& y) {
  const Rows weight = weight_rows(w);
  const TileGrid grid = tile_grid(m, n);
  const Slices slices(k);
  auto* const packed = reinterpret_cast<bf16*>(
      workspace<Purpose::shared>(tiles_of(grid.rows) * slices.steps * kTileElements / 2));
  for (int64_t row = 0; row < m; row += grid.rows) {
    const int64_t rows = std::min(grid.rows, m - row), row_tiles = tiles_of(rows);
    pack_tiles(slices, row_tiles, packed, [&](int64_t t, int64_t step, bf16* to) {
      pack_right_tile(x, row + t * kTile, row + rows, step, to);
    });
    parallel_chunks((n + grid.columns - 1) / grid.columns, [&](int64_t task) {
      const int64_t column = task * grid.columns, columns = std::min(grid.columns, n - column);
      Block<RowsAreColumns> block(row, rows, column, columns);
      block.fill(bias);
      block.template accumulate<Floats>(low_rank);
      auto* const group = reinterpret_cast<bf16*>(block.packed);
      const Tiles tiles;
      const auto decode = w.quantized->absmax_q ? decode_rows<true> : decode_rows<false>;
      for_groups(columns, slices, [&](int64_t c, int64_t s) {
        const int64_t count = slices.size(s), next = count * kTileElements;
        const int64_t wanted = std::min(kGroupColumns, columns - c);
        const bool last = c + kGroupColumns >= columns;
        const int64_t ahead = (last ? count * kTileDepth - c * k : kGroupColumns * k) / 2;
        decode(weight, column + c, wanted, s * kTileDepth, count, ahead, group);
        for (int64_t t = 0; t < row_tiles; t += 2) {
          multiply_up_to_2x2(tiles_of(wanted), row_tiles - t, group, packed + packed_at(slices, row_tiles, t, s), count,
                             next, block.acc + c * block.ld + t * kTile, block.ld);
        }
      });
      block.write(y);
    });
  }
}

// sums [columns] += a row of `from`.
static inline void add_row(const MutMatrix& from, int64_t row, int64_t column, int64_t columns, float* sums) {
  with_type(from.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* x = static_cast<const T*>(from.data) + row * from.ld + column;
    for (int64_t j = 0; j < columns; j += kLanes) store(sums + j, add(load(sums + j), load(x + j)));
  });
}

static inline void write_row(const float* sums, int64_t columns, const MutMatrix& to, int64_t row, int64_t column) {
  with_type(to.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* y = static_cast<T*>(to.data) + row * to.ld + column;
    for (int64_t j = 0; j < columns; j += kLanes) store(y + j, load(sums + j));
  });
}

// dx = dy . W + mask * tail: the weight is the right operand, and sums are in rows as dx is.
static inline void linear_dx_tiles(const Matrix& dy, int64_t m, int64_t n, int64_t k, const Weight& w,
                                   const LowRank& tail, const Dropout& dropout, bool add_to, const MutMatrix& dx) {
  const Rows weight = weight_rows(w);
  const TileGrid grid = tile_grid(m, k);
  const Slices slices(n);
  const int64_t ld = grid.columns + kTile;  // not a power of two
  float* const shared =
      workspace<Purpose::shared>(tiles_of(grid.rows) * slices.steps * kTileElements / 2 + grid.rows * tail.rank);
  auto* const packed = reinterpret_cast<bf16*>(shared + grid.rows * tail.rank);
  for (int64_t row = 0; row < m; row += grid.rows) {
    const int64_t rows = std::min(grid.rows, m - row), row_tiles = tiles_of(rows);
    for (int64_t i = 0; i < rows * tail.rank; ++i) shared[i] = tail.scale * tail.left[row * tail.rank + i];
    pack_tiles(slices, row_tiles, packed, [&](int64_t t, int64_t step, bf16* to) {
      pack_left_tile(dy, row + t * kTile, row + rows, n, step, to);
    });
    parallel_chunks((k + grid.columns - 1) / grid.columns, [&](int64_t task) {
      const int64_t column = task * grid.columns, columns = std::min(grid.columns, k - column);
      float* const acc = workspace(row_tiles * kTile * ld + kGroupElements / 2);
      auto* const group = reinterpret_cast<bf16*>(acc + row_tiles * kTile * ld);
      Ahead nothing;
      outer({shared, tail.rank, 1}, rows, {tail.right + column, k}, columns, tail.rank, {acc, ld, nullptr, 0, nullptr},
            nothing);
      for (int64_t r = 0; r < rows; ++r) {
        if (tail.rank) apply_dropout(dropout, (row + r) * k + column, columns, acc + r * ld);
        if (add_to) add_row(dx, row + r, column, columns, acc + r * ld);
      }
      const Tiles tiles;
      const auto decode = w.quantized->absmax_q ? decode_row_pairs<true> : decode_row_pairs<false>;
      for_groups(columns, slices, [&](int64_t c, int64_t s) {
        const int64_t count = slices.size(s), next = count * kTileElements, in_line = c % kLineColumns;
        const bool last = c - in_line + kLineColumns >= columns;
        const int64_t ahead = (last ? count * kTileDepth * k - c + in_line : kLineColumns) / 2;
        decode(weight, s * kTileDepth, n - s * kTileDepth, column + c, count, ahead, group);
        for (int64_t t = 0; t < row_tiles; t += 2) {
          multiply_up_to_2x2(row_tiles - t, 2, packed + packed_at(slices, row_tiles, t, s), group, count, next,
                             acc + t * kTile * ld + c, ld);
        }
      });
      for (int64_t r = 0; r < rows; ++r) write_row(acc + r * ld, columns, dx, row + r, column);
    });
  }
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
