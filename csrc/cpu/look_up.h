// A register tile that looks each weight up where it multiplies it: no weight is decoded into a buffer.
//
// Tiling. 8 output columns x two vectors of rows. Every 64 steps of the reduction the 8 blocks' codebooks are scaled
// into L1 (8 multiplications for 1024 FMAs, a run ahead of their use); a weight is then one broadcast from there, at
// the address its nibble gives. Nibbles are cut out in integer registers, so nothing but FMAs and loads uses the vector
// units, which shuffles share with the FMAs: at 32 rows 4 % of the time. A weight serves two FMAs. With one there are
// too many instructions for each; with three, or more panels of rows, decode_beside.h costs less. Bytes: the packed
// weight once, the left slice once a tile from L2.
#pragma once
#include "gemm_micro.h"
#include "rows.h"

namespace fusetune {
namespace FUSETUNE_ISA {

constexpr int kLookUpVectors = 2, kLookUpColumns = 8, kLookUpRun = 64;

// code[c] = the codebook of element i of row c below, scaled.
template <bool nested>
FUSETUNE_INLINE void scale_codebooks(const Rows& rows, uint64_t i, float (*code)[16]) {
  const Weight4bit& w = *rows.quantized;
#pragma GCC unroll 8
  for (int c = 0; c < kLookUpColumns; ++c, i += static_cast<uint64_t>(w.cols)) {
    const float absmax = block_absmax<nested>(w, rows.nested_shift, i >> rows.block_shift);
    for (int j = 0; j < 16; j += kLanes) store(code[c] + j, mul(load(w.code + j), set1(absmax)));
  }
}

// out [kLookUpColumns][ld] += left [depth][2 vectors] . weight; element i of the flattened weight is the first column's
// first. Runs of 64 lie in one block and in whole bytes, and depth is a multiple of them.
template <bool nested>
__attribute__((noinline)) static void look_up_tile(const float* left, const Rows& rows, uint64_t i, int64_t depth,
                                                   float* out, int64_t ld) {
  F acc[kLookUpColumns][kLookUpVectors];
#pragma GCC unroll 8
  for (int c = 0; c < kLookUpColumns; ++c) {
#pragma GCC unroll 2
    for (int v = 0; v < kLookUpVectors; ++v) {
      __builtin_prefetch(out + c * ld + v * kLanes, 1);
      acc[c][v] = zero();
    }
  }
  const int64_t bytes = rows.quantized->cols / 2;  // of a row
  const uint8_t* packed = rows.quantized->packed + i / 2;
  alignas(64) float codes[2][kLookUpColumns][16];
  scale_codebooks<nested>(rows, i, codes[0]);
  for (int64_t run = 0; run < depth / kLookUpRun; ++run) {
    const auto& code = codes[run & 1];
    i += kLookUpRun;
    if ((run + 1) * kLookUpRun < depth) scale_codebooks<nested>(rows, i, codes[~run & 1]);
#pragma GCC unroll 8
    for (int c = 0; c < kLookUpColumns; ++c) __builtin_prefetch(packed + (c + kPrefetchRows) * bytes);
    for (int b = 0; b < kLookUpRun / 2; ++b, ++packed) {
      F x[2][kLookUpVectors];
#pragma GCC unroll 2
      for (int step = 0; step < 2; ++step) {
#pragma GCC unroll 2
        for (int v = 0; v < kLookUpVectors; ++v, left += kLanes) {
          __builtin_prefetch(left + 16 * kLookUpVectors * kLanes);
          x[step][v] = load(left);
        }
      }
#pragma GCC unroll 8
      for (int c = 0; c < kLookUpColumns; ++c) {
        const unsigned byte = packed[c * bytes];
        const F first = set1(code[c][byte >> 4]), second = set1(code[c][byte & 15]);
#pragma GCC unroll 2
        for (int v = 0; v < kLookUpVectors; ++v) acc[c][v] = fma(x[0][v], first, acc[c][v]);
#pragma GCC unroll 2
        for (int v = 0; v < kLookUpVectors; ++v) acc[c][v] = fma(x[1][v], second, acc[c][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < kLookUpColumns; ++c) {
#pragma GCC unroll 2
    for (int v = 0; v < kLookUpVectors; ++v) {
      float* const p = out + c * ld + v * kLanes;
      store(p, add(load(p), acc[c][v]));
    }
  }
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
