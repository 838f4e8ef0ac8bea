// linear for a few rows of x: dot products straight from the weight's storage, lanes along the reduction.
//
// Tiling. A thread takes a run of weight rows, kRowsAtOnce at a time, against all m rows of x: each weight is decoded
// once, in registers, for m FMAs, and nothing but y is written. Bytes: the weight once and in order (4096 x 4096 in 4
// bits: 8.4 MB and 1 MB of absmax); x, 4 m k bytes, stays in L1/L2. It is copied to fp32 [k / 32][m][32]: rows of x
// often lie a power of two apart, where they would evict each other from L1. (On AVX2 in the order that decoding gives.)
#pragma once
#include <algorithm>
#include <type_traits>

#include "../parallel.h"
#include "convert.h"
#include "gemv_rows.h"
#include "rows.h"
#include "workspace.h"

namespace fusetune {
namespace FUSETUNE_ISA {

// Registers for kRowsAtOnce * m accumulators, and for the codebook: 32 on AVX-512, 16 on AVX2.
#if defined(FUSETUNE_ISA_AVX512)
constexpr int kGemvRows = 8, kRowsAtOnce = 2;
#else
constexpr int kGemvRows = 4, kRowsAtOnce = 1;
#endif

struct GemvArgs {
  int64_t n, k;
  const float* x;  // [k / kChunk rounded up][m][kChunk], zeros at the end
  const float* bias;
  const float* left;  // [m, rank], scaled
  const float* right;
  int64_t rank;
  MutMatrix y;
};

// y[0 .. m)[row .. row + n) = sums [kLanes][m], each summed over its lanes, + bias + tail. Transposed, all are summed at
// once, and y is written in whole vectors: threads would fight over its lines, number by number.
template <int m>
static void finish_rows(const GemvArgs& args, int64_t row, int n, F (&sums)[kLanes][m]) {
  for (int r = 0; r < n; ++r) {
    for (int64_t i = 0; i < args.rank; i += kLanes) {
      const int count = static_cast<int>(std::min<int64_t>(kLanes, args.rank - i));
      const F v = load_part(args.right + (row + r) * args.rank + i, count);
      for (int s = 0; s < m; ++s) sums[r][s] = fma(v, load_part(args.left + s * args.rank + i, count), sums[r][s]);
    }
  }
  for (int s = 0; s < m; ++s) {
    F v[kLanes];
    for (int r = 0; r < kLanes; ++r) v[r] = r < n ? sums[r][s] : zero();
    transpose(v);
    for (int half = kLanes / 2; half; half /= 2) {
      for (int r = 0; r < half; ++r) v[r] = add(v[r], v[r + half]);
    }
    const F value = args.bias ? add(v[0], load_part(args.bias + row, n)) : v[0];
    const int64_t at = s * args.y.ld + row;
    const auto typed = [&](auto* y) { n == kLanes ? store(y + at, value) : store_part(y + at, value, n); };
    if (args.y.dtype == Dtype::f32) {
      typed(static_cast<float*>(args.y.data));
    } else if (args.y.dtype == Dtype::f16) {
      typed(static_cast<f16*>(args.y.data));
    } else {
      typed(static_cast<bf16*>(args.y.data));
    }
  }
}

// All rows of the weight, rows_at_once at a time: dot(std::integral_constant<int, rows>, row, sums) gives the lanes of
// sums [rows][m]. Long chunks: a thread prefetches beyond its own in vain, and has nothing prefetched at its start.
template <int m, int rows_at_once, class Dot>
static void for_rows(const GemvArgs& args, const Dot& dot) {
  constexpr int64_t kChunksPerThread = 4;
  const int64_t even = args.n / (kChunksPerThread * num_threads()), step = std::max<int64_t>(1, even / 16) * 16;
  parallel_chunks((args.n + step - 1) / step, [&](int64_t chunk) {
    const int64_t end = std::min((chunk + 1) * step, args.n);
    for (int64_t row = chunk * step; row < end; row += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, end - row));
      F sums[kLanes][m];
      int r = 0;
      for (; r + rows_at_once <= n; r += rows_at_once) {
        dot(std::integral_constant<int, rows_at_once>{}, row + r, sums + r);
      }
      for (; r < n; ++r) dot(std::integral_constant<int, 1>{}, row + r, sums + r);
      finish_rows(args, row, n, sums);
    }
  });
}

// dot_rows: sums [rows][m], not yet summed over their lanes, of rows [row, row + rows) of the weight.
#if defined(FUSETUNE_HAS_EVEN_ODD)
// For a row or two of x registers are left to scale what a block gives, not each element.
template <int m, int rows, bool nested, std::enable_if_t<m <= 2, int> = 0>
static void dot_rows(const Row4bit<nested>& source, const GemvArgs& args, int64_t row, F (*sums)[m]) {
  static_assert(rows == 1, "registers for one row of the weight");
  F acc[m];
  for (F& v : acc) v = zero();
  typename Row4bit<nested>::State state;
  for (int64_t i = 0; i < args.k;) {
    const int64_t end = std::min(i + source.span(), args.k);
    source.prepare(state, row, i);
    for (; i < end; i += source.w.blocksize) source.add_block(source.open(state, row, i), i, args.x + i * m, acc);
  }
  for (int s = 0; s < m; ++s) sums[0][s] = acc[s];
}
#endif

template <int m, int rows, class Source>
static void dot_rows(const Source& source, const GemvArgs& args, int64_t row, F (*sums)[m]) {
  // Enough independent chains to cover the latency of the FMA.
  constexpr int chains = std::min(kChunkVectors, std::max(1, 8 / (m * rows)));
  F acc[rows][m][chains];
  for (auto& of_row : acc) {
    for (auto& of_m : of_row) {
      for (F& v : of_m) v = zero();
    }
  }
  const float* x = args.x;
  const auto multiply = [&](const F(&v)[rows][kChunkVectors]) {
#pragma GCC unroll 8
    for (int j = 0; j < kChunkVectors; ++j) {
#pragma GCC unroll 8
      for (int s = 0; s < m; ++s) {
        const F from_x = load(x + s * kChunk + j * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) acc[r][s][j % chains] = fma(v[r][j], from_x, acc[r][s][j % chains]);
      }
    }
    x += m * kChunk;
  };
  typename Source::State state[rows];
  typename Source::Run run[rows];
  F v[rows][kChunkVectors];
  int64_t i = 0;
  while (i + kChunk <= args.k) {
    const int64_t end = std::min(i + source.span(), args.k - kChunk + 1);
    for (int r = 0; r < rows; ++r) source.prepare(state[r], row + r, i);
    while (i < end) {
      const int64_t stop = std::min(source.stop(i), end);
      for (int r = 0; r < rows; ++r) run[r] = source.open(state[r], row + r, i);
      for (; i < stop; i += kChunk) {
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) Source::load_chunk(run[r], i, v[r]);
        multiply(v);
      }
    }
  }
  if (i < args.k) {
    for (int r = 0; r < rows; ++r) {
      run[r] = source.open(state[r], row + r, i);
      for (int j = 0; j < kChunkVectors; ++j) {
        const int64_t rest = args.k - i - j * kLanes;
        v[r][j] = rest > 0
                      ? Source::load_rest(run[r], i + j * kLanes, static_cast<int>(std::min<int64_t>(rest, kLanes)))
                      : zero();
      }
    }
    multiply(v);
  }
  for (int r = 0; r < rows; ++r) {
    for (int s = 0; s < m; ++s) {
      sums[r][s] = acc[r][s][0];
      for (int c = 1; c < chains; ++c) sums[r][s] = add(sums[r][s], acc[r][s][c]);
    }
  }
}

template <int m = 1, class Source>
static void gemv(int64_t rows, const Source& source, const GemvArgs& args) {
  if (rows == m) {
    return for_rows<m, kRowsAtOnce>(args, [&](auto at_once, int64_t row, F(*sums)[m]) {
      dot_rows<m, at_once.value>(source, args, row, sums);
    });
  }
  if constexpr (m < kGemvRows) gemv<m + 1>(rows, source, args);
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
