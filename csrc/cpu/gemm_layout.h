// How the macro kernel of gemm.h reads a weight: in which rectangles, into which order, as which elements.
//
// Tiling: see gemm.h. A group of columns x depth is decoded into a buffer of 24 KB (forward) or 64 KB (backward), half
// of that as bf16 pairs; per group columns * depth / 2 bytes of codes are read.
#pragma once
#include <algorithm>

#include "decode_beside.h"
#include "gemm_micro.h"
#include "look_up.h"
#include "rows.h"

namespace fusetune {
namespace FUSETUNE_ISA {

// How a direction lays a group of the weight out for the tiles, as Floats or as Pairs along the reduction. Rows are
// padded so that they do not fall into the same cache sets.

// A weight row is an output column (forward).
template <class Elements>
struct RowsAreColumns {
  static constexpr int elements = Elements::WideVec::elements;
  // A group is whole tiles of every width.
  static constexpr int group = kMaxTileColumns, depth = kMaxTileColumns == 8 ? 768 : 512;
  static constexpr int column_stride = depth / elements + 16;
  static constexpr int buffer = group * column_stride;
  using Strides = BufferStrides<column_stride, 1>;
  template <bool nested>
  using Decode = DecodeRuns<nested, Elements>;

  static void read(const Rows& rows, int64_t column, int64_t columns, int64_t d, int64_t steps, float* dst) {
    if constexpr (elements == 1) {
      rows.read(column, columns, d, steps, dst, column_stride);
    } else {
      float row[depth];
      for (int64_t c = 0; c < columns; ++c, dst += column_stride) {
        rows.read(column + c, 1, d, steps, row, depth);
        std::fill_n(row + steps, -steps & (2 * kLanes - 1), 0.f);
        for (int64_t i = 0; i < steps; i += 2 * kLanes) {
          store(dst + i / 2, Elements::to_pairs(load(row + i), load(row + i + kLanes)));
        }
      }
    }
  }
  // The group from d of the reduction on where it lies, if the tiles can read it there, else null: a tile's few rows are
  // streams that the hardware prefetches. The copy would cost 20 % of 32 rows' time.
  static const float* in_place(const Rows& rows, int64_t left_rows, int64_t column, int64_t columns, int64_t d) {
    // The tiles of a single vector read twelve rows, which may all fall into the same eight ways of the cache.
    if (!kTilesReadRows || elements != 1 || left_rows <= kLanes || columns < group || !rows.plain()) return nullptr;
    return reinterpret_cast<const float*>(rows.data) + column * rows.ld + d;
  }
  static bool can_decode_beside(const Rows& rows, int64_t, int64_t d, int64_t steps) {
    return FUSETUNE_ISA::can_decode_beside(rows, d, steps);
  }
  // Whether look_up.h's tiles are to take it, whose one panel all rows have to fill.
  static bool looks_up(const Rows& rows, int64_t left_rows, int64_t steps) {
    return kLooksUp && elements == 1 && rows.quantized && left_rows > (kLookUpVectors - 1) * kLanes &&
           left_rows <= kLookUpVectors * kLanes && can_decode_beside(rows, 0, 0, steps);
  }
#if defined(FUSETUNE_ISA_AVX2)
  template <class T>
  static CopyRuns<T> copy_beside(const Rows& rows, int64_t column, int64_t d, int64_t steps, float* dst) {
    return {rows, column, d, steps, dst, column_stride, group};
  }
#endif
  template <bool nested>
  static Decode<nested> decode_beside(const Rows& rows, int64_t column, int64_t d, int64_t steps, float* dst,
                                      uint64_t ahead) {
    return {rows, column, group, d, steps, dst, column_stride, group, ahead};
  }
  static int64_t element(const Rows& rows, int64_t column, int64_t d) { return column * rows.ld + d; }
};

// A weight row is a step of the reduction (backward).
template <class Elements>
struct RowsAreDepth {
  static constexpr int elements = Elements::WideVec::elements;
  static constexpr int group = 64, depth = 256, depth_stride = group;
  using Strides = BufferStrides<1, depth_stride>;
  static constexpr int buffer = depth / elements * depth_stride + 16;  // the last tile may be wider than the group

  static void read(const Rows& rows, int64_t column, int64_t columns, int64_t d, int64_t steps, float* dst) {
    if constexpr (elements == 1) {
      rows.read(d, steps, column, columns, dst, depth_stride);
    } else {
      float pair[2 * group];
      for (int64_t i = 0; i < steps; i += 2, dst += depth_stride) {
        std::fill_n(pair, 2 * group, 0.f);
        rows.read(d + i, 2, column, columns, pair, group);
        for (int64_t c = 0; c < columns; c += kLanes) {
          store(dst + c, Elements::zip_pairs(load(pair + c), load(pair + group + c)));
        }
      }
    }
  }
  static const float* in_place(const Rows&, int64_t, int64_t, int64_t, int64_t) { return nullptr; }
  static bool looks_up(const Rows&, int64_t, int64_t) { return false; }  // each step has another codebook
  static bool can_decode_beside(const Rows& rows, int64_t column, int64_t, int64_t steps) {
    return steps % kRun == 0 && FUSETUNE_ISA::can_decode_beside(rows, column, group);
  }
#if defined(FUSETUNE_ISA_AVX2)
  template <class T>
  static CopyRuns<T> copy_beside(const Rows& rows, int64_t column, int64_t d, int64_t, float* dst) {
    return {rows, d, column, group, dst, depth_stride, group};
  }
#endif
  template <bool nested>
  static auto decode_beside(const Rows& rows, int64_t column, int64_t d, [[maybe_unused]] int64_t steps, float* dst,
                            uint64_t ahead) {
    if constexpr (elements == 1) {
      return DecodeRuns<nested, Floats>(rows, d, steps, column, group, dst, depth_stride, group, ahead);
    } else {
      return DecodeRowPairs<nested, Elements>(rows, d, column, group, dst, depth_stride, group, ahead);
    }
  }
  static int64_t element(const Rows& rows, int64_t column, int64_t d) { return d * rows.ld + column; }
};

// Calls f with what the tiles are to multiply. Pairs of bf16 where the CPU has the instruction and x is bf16: a 4-bit
// weight is then rounded to bf16, as it is by bitsandbytes. They lie along the reduction, which must be even, and so
// must the distance of two rows of x. Intel's processors have the instruction too, but it takes more than four times as
// long as an FMA there.
template <class Function>
static void with_elements([[maybe_unused]] const Matrix& left, [[maybe_unused]] const Weight& right,
                          [[maybe_unused]] int64_t depth, const Function& f) {
#if defined(FUSETUNE_HAS_BF16_DOT)
  const bool even = depth % 2 == 0 && left.ld % 2 == 0;
  if (left.dtype == Dtype::bf16 && right.quantized && even && !__builtin_cpu_is("intel")) return f(Pairs{});
#endif
  f(Floats{});
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
