// Decodes a rectangle of a 4-bit weight, run by run, while the tiles of another one multiply.
//
// Tiling. For 8 output columns and kRun elements of the reduction there are 8 runs of kRun weights to decode, so on
// AVX-512 a tile of 8 columns decodes one run every kRun / 8 elements: 4 vectors and one scaled codebook, about 10
// cycles of shuffles and stores in the shadow of 64 to 192 cycles of FMAs. AVX2 has three registers to spare and decodes
// one every 16 elements, an eighth at a time: what 4 columns need. At 32 rows decoding on its own takes a
// tenth of the time.
#pragma once
#include <type_traits>

#include "gemm_micro.h"
#include "rows.h"

namespace fusetune {
namespace FUSETUNE_ISA {

#if defined(FUSETUNE_ISA_AVX512) || defined(FUSETUNE_ISA_AVX2)
constexpr bool kDecodesBeside = true;
#else
constexpr bool kDecodesBeside = false;
#endif
// A tile decodes as many weights as so many columns of it multiply.
#if defined(FUSETUNE_ISA_AVX2)
constexpr bool kCopiesBeside = true;
constexpr int kColumnsBeside = 4;
constexpr int kMaxRuns = 256;  // of a group: gemm_layout.h
#else
constexpr bool kCopiesBeside = false;
constexpr int kColumnsBeside = 8;
#endif

// What is decoded next.
struct Cursor {
  int64_t done;  // pieces of a row
  uint64_t i;    // of the piece, in the flattened weight
  float* dst;
  int64_t halves;  // of runs behind it; AVX2, nested
};

// What both kinds of decoding step through: rows of a weight, `cols` columns from `col` on, in pieces.
struct Rectangle {
  Weight4bit w;
  Codebook code;
  int shift, nested_shift;
  int64_t pieces;     // of a row
  uint64_t row_step;  // from the end of a row's pieces to the next row's
  uint64_t ahead;     // elements, to what is asked for meanwhile
  int64_t dst_step;

  // rows_at_once: that a piece takes; dst_row: floats that a row's columns fill; stride: from one of them to the next
  Rectangle(const Rows& rows, int64_t cols, int64_t pieces, int rows_at_once, int64_t dst_row, int64_t stride,
            uint64_t ahead)
      : w(*rows.quantized),
        code(rows.code),
        shift(rows.block_shift),
        nested_shift(rows.nested_shift),
        pieces(pieces),
        row_step(static_cast<uint64_t>(rows_at_once * w.cols - cols)),
        ahead(ahead),
        dst_step(stride - dst_row) {}

  template <bool nested>
  FUSETUNE_INLINE_METHOD ScaledCodebook codebook_at(uint64_t element) const {
    return scale_codebook(code, block_absmax<nested>(w, nested_shift, element >> shift));
  }
  template <bool nested>
  FUSETUNE_INLINE_METHOD void prefetch(uint64_t element) const {
    __builtin_prefetch(w.packed + element / 2);
    if (nested) {
      __builtin_prefetch(w.absmax_q + (element >> shift));
    } else {
      __builtin_prefetch(w.absmax + (element >> shift));
    }
  }
  FUSETUNE_INLINE_METHOD void advance(Cursor& next, uint64_t elements, int64_t floats) const {
    next.i += elements;
    next.dst += floats;
    if (++next.done == pieces) {
      next.done = 0;
      next.i += row_step;
      next.dst += dst_step;
    }
  }
};

// The first piece of a rectangle at (row, col), and of the buffer.
static inline Cursor cursor_at(const Rows& rows, int64_t row, int64_t col, float* dst) {
  return {0, static_cast<uint64_t>(row * rows.quantized->cols + col), dst, 0};
}

// Rows [row, row + count) x columns [col, col + cols) of the weight, as floats or as pairs of neighbours in a row, into
// dst[r * stride + c / elements]. Every run must lie in one block and in whole bytes: see can_decode_beside.
#if defined(FUSETUNE_ISA_AVX2)
template <bool nested, class Elements>
struct DecodeRuns {
  static constexpr int kParts = 4, kEvery = 2, kHalf = 32;
  using Own = const DecodeRuns&;  // no registers for it
  Rectangle at;
  Cursor cursor;
  int64_t tiles;           // that have to decode until all is done
  float absmax[kMaxRuns];  // of each run, where nested: three dependent loads would be too much beside a tile

  DecodeRuns(const Rows& rows, int64_t row, int64_t count, int64_t col, int64_t cols, float* dst, int64_t stride,
             int64_t group, uint64_t ahead)
      : at(rows, cols, cols / kHalf, 1, cols, stride, ahead),
        cursor(cursor_at(rows, row, col, dst)),
        tiles(group / kColumnsBeside) {
    if constexpr (nested) {
      float* to = absmax;
      for (int64_t r = 0; r < count; ++r) {
        const uint64_t first = cursor.i + static_cast<uint64_t>(r * at.w.cols), end = first + static_cast<uint64_t>(cols);
        for (uint64_t i = first; i < end; i += kRun) {
          *to++ = block_absmax<true>(at.w, at.nested_shift, i >> at.shift);
        }
      }
    }
  }

  template <class Function>
  FUSETUNE_INLINE_METHOD void step(Cursor& next, const Function& between) const {
    DecodeParts parts;
    parts.unpack_nibbles(at.w.packed + next.i / 2);
    between();
    parts.look_up_low(at.code);
    between();
    parts.look_up_high(at.code);
    between();
    at.prefetch<nested>(next.i + at.ahead);
    parts.store_scaled(nested ? absmax[next.halves++ / 2] : at.w.absmax[next.i >> at.shift], next.dst);
    at.advance(next, kHalf, kHalf);
    between();
  }
};

// The same of a dense weight, which tiles that read it in place (gemm_layout.h) do without.
template <class T>
struct CopyRuns {
  static constexpr int kParts = 4, kEvery = 2, kHalf = 32;
  using Own = const CopyRuns&;
  const T* data;
  int64_t ahead, pieces, row_step, dst_step;
  Cursor cursor;
  int64_t tiles;

  CopyRuns(const Rows& rows, int64_t row, int64_t col, int64_t cols, float* dst, int64_t stride, int64_t group)
      : data(reinterpret_cast<const T*>(rows.data)),
        ahead(kPrefetchRows / 2 * rows.ld),
        pieces(cols / kHalf),
        row_step(rows.ld - cols),
        dst_step(stride - cols),
        cursor{0, static_cast<uint64_t>(row * rows.ld + col), dst, 0},
        tiles(group / kColumnsBeside) {}

  template <class Function>
  FUSETUNE_INLINE_METHOD void step(Cursor& next, const Function& between) const {
    const T* from = data + next.i;
#pragma GCC unroll 4
    for (int v = 0; v < kHalf; v += kLanes) {
      if (v * sizeof(T) % 64 == 0) __builtin_prefetch(from + ahead + v);
      store(next.dst + v, load(from + v));
      between();
    }
    next.i += kHalf;
    next.dst += kHalf;
    if (++next.done < pieces) return;
    next.done = 0;
    next.i += static_cast<uint64_t>(row_step);
    next.dst += dst_step;
  }
};
#else
template <bool nested, class Elements>
struct DecodeRuns {
  static constexpr int kFloats = kRun / Elements::WideVec::elements;
  static constexpr int kParts = 1, kEvery = kFloats / 8;
  using Own = const DecodeRuns;  // in registers
  Rectangle at;
  Cursor cursor;
  int64_t tiles;  // that have to decode until all is done

  DecodeRuns(const Rows& rows, int64_t row, int64_t, int64_t col, int64_t cols, float* dst, int64_t stride,
             int64_t group, uint64_t ahead)
      : at(rows, cols, cols / kRun, 1, cols / Elements::WideVec::elements, stride, ahead),
        cursor(cursor_at(rows, row, col, dst)),
        tiles(group / kColumnsBeside) {}

  template <class Function>
  FUSETUNE_INLINE_METHOD void step(Cursor& next, const Function& between) const {
    const auto scaled = at.codebook_at<nested>(next.i);
    at.prefetch<nested>(next.i + at.ahead);
#pragma GCC unroll 4
    for (int j = 0; j < kRun; j += 2 * kLanes) {
      const uint8_t* from = at.w.packed + (next.i + j) / 2;
      const F a = decode16_beside_fma(from, scaled), b = decode16_beside_fma(from + kLanes / 2, scaled);
      if constexpr (std::is_same_v<Elements, Floats>) {
        store(next.dst + j, a);
        store(next.dst + j + kLanes, b);
      } else {
        store(next.dst + j / 2, Elements::to_pairs(a, b));
      }
    }
    at.advance(next, kRun, kFloats);
    between();
  }
};
#endif

// The same of two rows at a time, as pairs of neighbours in a column: half a run of both makes one vector.
template <bool nested, class Elements>
struct DecodeRowPairs {
  static constexpr int kColumns = kRun / 2;
  static constexpr int kParts = 1, kEvery = kRun / 8 / 2;
  using Own = const DecodeRowPairs;  // in registers
  Rectangle at;
  Cursor cursor;
  int64_t tiles;  // that have to decode until all is done

  DecodeRowPairs(const Rows& rows, int64_t row, int64_t col, int64_t cols, float* dst, int64_t stride, int64_t group,
                 uint64_t ahead)
      : at(rows, cols, cols / kColumns, 2, cols, stride, ahead),
        cursor(cursor_at(rows, row, col, dst)),
        tiles(group / kColumnsBeside) {}

  template <class Function>
  FUSETUNE_INLINE_METHOD void step(Cursor& next, const Function& between) const {
    const uint64_t below = next.i + static_cast<uint64_t>(at.w.cols);
    const auto upper_code = at.codebook_at<nested>(next.i), lower_code = at.codebook_at<nested>(below);
    const uint8_t *upper = at.w.packed + next.i / 2, *lower = at.w.packed + below / 2;
    at.prefetch<nested>(next.i + at.ahead);
    at.prefetch<nested>(below + at.ahead);
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; j += kLanes) {
      const F a = decode16_beside_fma(upper + j / 2, upper_code), b = decode16_beside_fma(lower + j / 2, lower_code);
      store(next.dst + j, Elements::zip_pairs(a, b));
    }
    at.advance(next, kColumns, kColumns);
    between();
  }
};

static inline bool can_decode_beside(const Rows& rows, int64_t col, int64_t cols) {
  if (!rows.quantized) return kCopiesBeside && rows.scale == 1.f && cols % kRun == 0;
  return kDecodesBeside && rows.quantized->cols % rows.quantized->blocksize == 0 &&
         rows.quantized->blocksize % kRun == 0 && col % kRun == 0 && cols % kRun == 0;
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
