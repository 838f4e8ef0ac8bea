// The register tile: out^T[columns][rows] += right[columns][depth] . left^T[depth][rows].
//
// Lanes run along the rows of the left operand (tokens), which is packed for it; the right operand (the weight) is
// broadcast element by element in whatever order it was decoded. So neither direction of a weight has to be
// transposed. A tile of `vectors` x `columns` accumulators does vectors * columns FMAs for vectors + columns loads.
#pragma once
#include <type_traits>

#include "isa/isa.h"

namespace fusetune {
namespace FUSETUNE_ISA {

// Accumulators must leave registers for the loaded vectors and one broadcast: 32 registers hold 3 x 8 + 4,
// 16 hold 3 x 4 + 4. Narrow tiles are wide in columns so that the FMA latency is covered.
#if defined(FUSETUNE_ISA_AVX2)
constexpr int tile_columns(int vectors) { return 12 / vectors; }
constexpr int kMinTileColumns = 4;  // for what wider tiles leave
constexpr bool kTilesReadRows = true;  // of a dense weight, where they are
constexpr bool kPrefetchLeft = false;  // costs 4 %: the loads and FMAs already fill what can be issued
#else
constexpr int tile_columns(int) { return 8; }
constexpr int kMinTileColumns = 8;
constexpr bool kTilesReadRows = false;  // eight rows that lie a power of two apart fill a set of the cache
constexpr bool kPrefetchLeft = true;
#endif
constexpr int kMaxVectors = 3;
constexpr int kMaxTileColumns = tile_columns(1);

// What a tile does besides: nothing, or the parts of a step of decode_beside.h's decoding, each ahead of kEvery
// elements of its depth. The FMAs that wait for their turn leave the other ports idle, so a few instructions between
// them cost next to none.
constexpr int kRun = 64;
struct Nothing {};

// Where the tile finds element (column, d) of the right operand: at column * strides.column + d * strides.depth.
template <int kColumn, int kDepth>
struct BufferStrides {
  static constexpr int64_t column = kColumn, depth = kDepth;
};
struct RowStrides {
  int64_t column;
  static constexpr int64_t depth = 1;
};

// left [depth][vectors * lanes], out [columns][ld]. A float of left and of right holds Vec::elements elements, and depth
// counts floats. Not inlined: among other code the compiler would spill accumulators.
template <class Vec, int vectors, int columns, class Strides, class Beside>
__attribute__((noinline)) static void tile(const float* left, const float* right, const Strides strides, int64_t depth,
                                           float* out, int64_t ld, Beside& beside) {
  using V = typename Vec::V;
  V acc[columns][vectors];
#pragma GCC unroll 16
  for (int c = 0; c < columns; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      if (v * sizeof(V) % 64 == 0) __builtin_prefetch(out + c * ld + v * Vec::lanes, 1);
      acc[c][v] = Vec::set1(0.f);
    }
  }
  const auto multiply = [&] {
    V x[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      if (kPrefetchLeft) __builtin_prefetch(left + (16 * vectors + v) * Vec::lanes);
      x[v] = Vec::load(left + v * Vec::lanes);
    }
#pragma GCC unroll 16
    for (int c = 0; c < columns; ++c) {
      const V w = Vec::set1(right[c * strides.column]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) acc[c][v] = Vec::fma(x[v], w, acc[c][v]);
    }
    left += vectors * Vec::lanes;
    right += strides.depth;
  };
  if constexpr (std::is_same_v<Beside, Nothing>) {
    for (int64_t d = 0; d < depth; ++d) multiply();
  } else {  // whole runs: see can_decode_beside
    auto next = beside.cursor;
    typename Beside::Own own = beside;
    const auto between = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int j = 0; j < Beside::kEvery; ++j) multiply();
    };
    for (int64_t d = 0; d < depth; d += Beside::kParts * Beside::kEvery) own.step(next, between);
    beside.cursor = next;
  }
#pragma GCC unroll 16
  for (int c = 0; c < columns; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      float* p = out + c * ld + v * Vec::lanes;
      Vec::store(p, Vec::add(Vec::load(p), acc[c][v]));
    }
  }
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
