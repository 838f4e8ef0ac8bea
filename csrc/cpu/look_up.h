// A register tile that looks each 4-bit weight up where it multiplies it: nothing is decoded into a buffer.
//
// Tiling. 3 output columns x 4 vectors of rows, on AVX2: 25 to 32 rows of x. Every 64 steps of the reduction the
// columns' codebooks are scaled into L1 (6 multiplications for 768 FMAs, a run ahead of their use); a weight is then
// one broadcast from there, at the address that its nibble gives. Nibbles are cut out in integer registers, so
// nothing but FMAs and loads uses the vector units, which decode_beside.h's shuffles share with the FMAs: alone in L1
// the tile reaches what it would reach without 4-bit weights. A weight serves four FMAs. With fewer there are too
// many instructions for each, and with several panels of rows decoding once for all of them costs no more. Bytes: the
// packed weight once, the left slice once a tile, from L2.
#pragma once
#include <type_traits>
#include <utility>

#include "gemm_micro.h"
#include "rows.h"

namespace fusetune {
namespace FUSETUNE_ISA {

#if defined(FUSETUNE_ISA_AVX2)
constexpr bool kLooksUp = true;
#else
constexpr bool kLooksUp = false;
#endif
constexpr int kLookUpVectors = 4, kLookUpColumns = 3;

// code[c] = the codebook of element i of the c-th row from there, scaled. Asks for what a later tile needs for it.
template <bool nested, int columns>
FUSETUNE_INLINE void scale_codebooks(const Rows& rows, uint64_t i, float* code) {
  const Weight4bit& w = *rows.quantized;
  const auto row = static_cast<uint64_t>(w.cols);
#pragma GCC unroll 4
  for (int c = 0; c < columns; ++c, i += row) {
    const uint64_t later = (i + kPrefetchRows * row) >> rows.block_shift;
    if (nested) {
      __builtin_prefetch(w.absmax_q + later);
    } else {
      __builtin_prefetch(w.absmax + later);
    }
    const F absmax = set1(block_absmax<nested>(w, rows.nested_shift, i >> rows.block_shift));
#pragma GCC unroll 4
    for (int j = 0; j < 16; j += kLanes) store(code + 16 * c + j, mul(load(w.code + j), absmax));
  }
}

// out [columns][ld] += left [depth][kLookUpVectors] . weight, of which element i of the flattened weight is the first.
// Runs of 64 lie in one block and in whole bytes, and depth is a multiple of them.
template <bool nested, int columns>
__attribute__((noinline)) static void look_up_tile(const float* left, const Rows& rows, uint64_t i, int64_t depth,
                                                   float* out, int64_t ld) {
  F acc[columns][kLookUpVectors];
#pragma GCC unroll 4
  for (int c = 0; c < columns; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < kLookUpVectors; ++v) {
      if (v % 2 == 0) __builtin_prefetch(out + c * ld + v * kLanes, 1);
      acc[c][v] = zero();
    }
  }
  const int64_t bytes = rows.quantized->cols / 2;  // of a row
  const uint8_t* packed = rows.quantized->packed + i / 2;
  alignas(64) float codes[2 * columns * 16];
  float *code = codes, *next = codes + columns * 16;
  scale_codebooks<nested, columns>(rows, i, code);
  const auto multiply = [&](const auto& place) __attribute__((always_inline)) {
    F w[columns];
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) w[c] = set1(code[16 * c + place(c)]);
#pragma GCC unroll 4
    for (int v = 0; v < kLookUpVectors; ++v) {
      const F x = load(left + v * kLanes);
#pragma GCC unroll 4
      for (int c = 0; c < columns; ++c) acc[c][v] = fma(x, w[c], acc[c][v]);
    }
    left += kLookUpVectors * kLanes;
  };
  for (int64_t d = 0; d < depth; d += kRun, std::swap(code, next)) {
    i += kRun;
    if (d + kRun < depth) scale_codebooks<nested, columns>(rows, i, next);
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) __builtin_prefetch(packed + (c + kPrefetchRows) * bytes);
    for (const uint8_t* const end = packed + kRun / 2; packed < end; ++packed) {
      uint64_t byte[columns];
      multiply([&](int c) { return (byte[c] = packed[c * bytes]) >> 4; });
      multiply([&](int c) { return byte[c] & 15; });
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < columns; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < kLookUpVectors; ++v) {
      float* const p = out + c * ld + v * kLanes;
      store(p, add(load(p), acc[c][v]));
    }
  }
}

// The same for any number of columns.
template <bool nested>
static void look_up_tiles(const float* left, const Rows& rows, uint64_t i, int64_t depth, int64_t columns, float* out,
                          int64_t ld) {
  const auto run = [&](auto width) {
    look_up_tile<nested, width>(left, rows, i, depth, out, ld);
    i += static_cast<uint64_t>(width * rows.quantized->cols);
    out += width * ld;
    columns -= width;
  };
  while (columns >= kLookUpColumns) run(std::integral_constant<int, kLookUpColumns>{});
  while (columns > 0) run(std::integral_constant<int, 1>{});
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
