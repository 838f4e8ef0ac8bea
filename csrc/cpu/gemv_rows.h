// Where the dot products of gemv.h take the rows of a weight from: 4-bit or dense, in chunks of 32 elements.
//
// Tiling. A chunk is decoded in registers and never stored. Bytes: packed codes and absmax once and in order, asked for
// six rows ahead; a nested absmax is decoded for a span of 64 blocks at once, into L1.
#pragma once
#include <algorithm>
#include <type_traits>

#include "rows.h"

namespace fusetune {
namespace FUSETUNE_ISA {

constexpr int kChunk = 32;  // elements per step
constexpr uint64_t kPrefetchBytes = 12288;  // of packed codes: six rows of 4096 elements ahead
constexpr int kChunkVectors = kChunk / kLanes;

// Into L2: more lines can be under way to it than to L1, which is what a weight read from memory is short of.
FUSETUNE_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

// Asks for what follows element i of the flattened weight. The hardware's prefetcher stops at every page, and
// decoding is too quick for it to catch up.
template <bool nested>
FUSETUNE_INLINE void prefetch_4bit(const Weight4bit& w, int shift, uint64_t i) {
  const uint64_t block = (i + 2 * kPrefetchBytes) >> shift;
  prefetch_l2(w.packed + i / 2 + kPrefetchBytes);
  if (nested) {
    prefetch_l2(w.absmax_q + block);
  } else {
    prefetch_l2(w.absmax + block);
  }
}

#if defined(FUSETUNE_HAS_BYTE_LOOKUP)
using NestedTable = ByteTable;
#else
struct NestedTable {};
#endif

// The absmax of a span of a row. Nested ones are decoded for the whole span at once: one by one, each with its chain of
// loads, they take as long as the blocks themselves.
template <bool nested>
struct RowAbsmax {
  static constexpr uint64_t kBlocks = 64;
  float values[kBlocks];
  uint64_t first;  // block of values[0]

#if defined(__GNUC__) && !defined(__clang__)
  __attribute__((optimize("no-tree-vectorize")))  // gathers are slower than loads
#endif
  __attribute__((noinline)) void
  decode(const Weight4bit& w, [[maybe_unused]] const NestedTable& table, int nested_shift, uint64_t block,
         uint64_t blocks) {
    const float* code = w.nested_code;
    const float offset = w.nested_offset;
    const uint8_t* q = w.absmax_q;
    float* value = values;
    first = block;
#if defined(FUSETUNE_HAS_BYTE_LOOKUP)
    const uint64_t all = static_cast<uint64_t>(w.rows * w.cols / w.blocksize), last = block + kBlocks - 1;
    if (last < all && block >> nested_shift == last >> nested_shift) {
      F v[kBlocks / kLanes];
      lookup_64(table, q + block, v);
      const F scale = set1(w.nested_absmax[block >> nested_shift]);
      for (int j = 0; j < 4; ++j) store(values + j * kLanes, add(mul(v[j], scale), set1(offset)));
      return;
    }
#endif
    const uint64_t end = block + blocks;
    for (uint64_t b = block; b < end;) {
      const float scale = w.nested_absmax[b >> nested_shift];
      const uint64_t stop = std::min(end, ((b >> nested_shift) + 1) << nested_shift);
#pragma GCC unroll 8
      for (; b < stop; ++b) *value++ = code[q[b]] * scale + offset;
    }
  }
  // Calls decode, and so empties the registers: outside of the loops that sum.
  FUSETUNE_INLINE_METHOD void prepare(const Weight4bit& w, const NestedTable& table, int nested_shift, uint64_t block,
                                      uint64_t blocks) {
    if (nested) decode(w, table, nested_shift, block, std::min(blocks, kBlocks));
  }
  FUSETUNE_INLINE_METHOD float at(const Weight4bit& w, uint64_t block) const {
    return nested ? values[block - first] : w.absmax[block];
  }
};

// Sources of weight rows. A source prepares a row's State for `span` elements from i on, opens the run that begins at
// element i, up to stop(i), and loads chunks of it. 4-bit rows must be whole blocks.
template <bool nested>
struct Row4bit {
  Weight4bit w;
  Codebook code;
  int shift, nested_shift;
  NestedTable table;

  explicit Row4bit(const Rows& rows)
      : w(*rows.quantized), code(rows.code), shift(rows.block_shift), nested_shift(rows.nested_shift) {
#if defined(FUSETUNE_HAS_BYTE_LOOKUP)
    if (nested) make_byte_table(w.nested_code, table);
#endif
  }

  using State = RowAbsmax<nested>;
  struct Run {
    ScaledCodebook code;
    const uint8_t* packed;
  };
  int64_t span() const { return nested ? static_cast<int64_t>(State::kBlocks) * w.blocksize : w.cols; }
  void prepare(State& state, int64_t row, int64_t i) const {
    state.prepare(w, table, nested_shift, static_cast<uint64_t>(row * w.cols + i) >> shift,
                  static_cast<uint64_t>(w.cols - i) >> shift);
  }
  int64_t stop(int64_t i) const { return i + w.blocksize; }
  Run open(const State& state, int64_t row, int64_t i) const {
    const uint64_t first = static_cast<uint64_t>(row * w.cols);
    const uint64_t element = first + static_cast<uint64_t>(i);
    const uint64_t block = element >> shift;
    prefetch_4bit<nested>(w, shift, element);
    return {scale_codebook(code, state.at(w, block)), w.packed + first / 2};
  }
  static void load_chunk(const Run& run, int64_t i, F (&v)[kChunkVectors]) {
#if defined(FUSETUNE_HAS_EVEN_ODD)
    decode32_even_odd(run.packed + i / 2, *run.code.code, v);
    for (F& value : v) value = mul(value, run.code.scale);
#else
    decode32(run.packed + i / 2, run.code, v);
#endif
  }
#if defined(FUSETUNE_HAS_EVEN_ODD)
  // sums [m] += x . the blocksize elements from i on, scaled once. x is that of the block.
  template <int m>
  FUSETUNE_INLINE_METHOD void add_block(const Run& run, int64_t i, const float* x, F (&sums)[m]) const {
    constexpr int chains = kChunkVectors / m;
    F part[m][chains];
#pragma GCC unroll 2
    for (int s = 0; s < m; ++s) {
#pragma GCC unroll 4
      for (int c = 0; c < chains; ++c) part[s][c] = zero();
    }
    const uint8_t* packed = run.packed + i / 2;
    const auto multiply = [&]() __attribute__((always_inline)) {
      F v[kChunkVectors];
      decode32_even_odd(packed, code, v);
#pragma GCC unroll 4
      for (int j = 0; j < kChunkVectors; ++j) {
#pragma GCC unroll 2
        for (int s = 0; s < m; ++s) part[s][j % chains] = fma(v[j], load(x + s * kChunk + j * kLanes), part[s][j % chains]);
      }
      packed += kChunk / 2;
      x += m * kChunk;
    };
    int64_t chunks = w.blocksize / kChunk;
    if (chunks % 2) multiply();
    for (chunks /= 2; chunks > 0; --chunks) multiply(), multiply();
#pragma GCC unroll 2
    for (int s = 0; s < m; ++s) {
      F sum = add(part[s][0], part[s][1]);
      if constexpr (chains == 4) sum = add(sum, add(part[s][2], part[s][3]));
      sums[s] = fma(sum, run.code.scale, sums[s]);
    }
  }
#endif
  static F load_rest(const Run&, int64_t, int) { return zero(); }  // whole blocks leave no rest
};
template <class T>
struct RowDense {
  const T* data;
  int64_t ld, k;
  using Run = const T*;
  struct State {};
  int64_t span() const { return k; }
  void prepare(State&, int64_t, int64_t) const {}
  int64_t stop(int64_t) const { return k; }
  Run open(const State&, int64_t row, int64_t) const { return data + row * ld; }
  static void load_chunk(Run run, int64_t i, F (&v)[kChunkVectors]) {
    for (int j = 0; j < kChunkVectors; ++j) v[j] = load(run + i + j * kLanes);
  }
  static F load_rest(Run run, int64_t i, int n) { return load_part(run + i, n); }
};

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
