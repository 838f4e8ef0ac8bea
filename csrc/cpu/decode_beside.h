// Decodes a rectangle of a 4-bit weight, run by run, while the tiles of another one multiply.
//
// Tiling. For 8 output columns and kRun elements of the reduction there are 8 runs of kRun weights to decode, so a tile
// of 8 columns decodes one run every kRun / 8 elements: 4 vectors and one scaled codebook, about 10 cycles of shuffles
// and stores in the shadow of 64 to 192 cycles of FMAs. At 32 rows decoding on its own takes a tenth of the time.
#pragma once
#include <type_traits>

#include "gemm_micro.h"
#include "rows.h"

namespace fusetune {
namespace FUSETUNE_ISA {

// Only where the registers hold a tile's accumulators and a codebook: elsewhere the accumulators would be spilled.
#if defined(FUSETUNE_ISA_AVX512)
constexpr bool kDecodesBeside = true;
#else
constexpr bool kDecodesBeside = false;
#endif

// What both kinds of decoding step through: rows of a weight, `cols` columns from `col` on, in pieces.
struct Rectangle {
  Weight4bit w;
  Codebook code;
  int shift, nested_shift;
  int64_t pieces, done = 0;  // of a row
  uint64_t i;                // of the next piece, in the flattened weight
  uint64_t row_step;         // from the end of a row's pieces to the next row's
  uint64_t ahead;            // prefetching
  float* dst;
  int64_t dst_step;

  // rows_at_once: that a piece takes; dst_row: floats that a row's columns fill; stride: from one of them to the next
  Rectangle(const Rows& rows, int64_t row, int64_t col, int64_t cols, int64_t pieces, int rows_at_once, float* dst,
            int64_t dst_row, int64_t stride)
      : w(*rows.quantized),
        code(rows.code),
        shift(rows.block_shift),
        nested_shift(rows.nested_shift),
        pieces(pieces),
        i(static_cast<uint64_t>(row * w.cols + col)),
        row_step(static_cast<uint64_t>(rows_at_once * w.cols - cols)),
        ahead(static_cast<uint64_t>(kPrefetchRows * w.cols)),
        dst(dst),
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
  FUSETUNE_INLINE_METHOD void advance(uint64_t elements, int64_t floats) {
    i += elements;
    dst += floats;
    if (++done == pieces) {
      done = 0;
      i += row_step;
      dst += dst_step;
    }
  }
};

// Rows [row, ..) x columns [col, col + cols) of the weight, as floats or as pairs of neighbours in a row, into
// dst[r * stride + c / elements]. Every run must lie in one block and in whole bytes: see can_decode_beside.
template <bool nested, class Elements>
struct DecodeRuns {
  static constexpr int kFloats = kRun / Elements::WideVec::elements;
  Rectangle at;

  DecodeRuns(const Rows& rows, int64_t row, int64_t col, int64_t cols, float* dst, int64_t stride)
      : at(rows, row, col, cols, cols / kRun, 1, dst, cols / Elements::WideVec::elements, stride) {}

  FUSETUNE_INLINE_METHOD void step() {
    const auto scaled = at.codebook_at<nested>(at.i);
    at.prefetch<nested>(at.i + at.ahead);
#pragma GCC unroll 4
    for (int j = 0; j < kRun / 32; ++j) {
      F v[32 / kLanes];
      decode32(at.w.packed + at.i / 2 + j * 16, scaled, v);
      if constexpr (std::is_same_v<Elements, Floats>) {
        for (int l = 0; l < 32 / kLanes; ++l) store(at.dst + 32 * j + l * kLanes, v[l]);
      } else {
        store(at.dst + 16 * j, Elements::to_pairs(v[0], v[1]));
      }
    }
    at.advance(kRun, kFloats);
  }
};

// The same of two rows at a time, as pairs of neighbours in a column: half a run of both makes one vector.
template <bool nested, class Elements>
struct DecodeRowPairs {
  static constexpr int kColumns = kRun / 2;
  Rectangle at;

  DecodeRowPairs(const Rows& rows, int64_t row, int64_t col, int64_t cols, float* dst, int64_t stride)
      : at(rows, row, col, cols, cols / kColumns, 2, dst, cols, stride) {}

  FUSETUNE_INLINE_METHOD void step() {
    const uint64_t below = at.i + static_cast<uint64_t>(at.w.cols);
    const auto upper_code = at.codebook_at<nested>(at.i), lower_code = at.codebook_at<nested>(below);
    const uint8_t *upper = at.w.packed + at.i / 2, *lower = at.w.packed + below / 2;
    at.prefetch<nested>(at.i + at.ahead);
    at.prefetch<nested>(below + at.ahead);
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; j += kLanes) {
      const F a = decode16(upper + j / 2, upper_code), b = decode16(lower + j / 2, lower_code);
      store(at.dst + j, Elements::zip_pairs(a, b));
    }
    at.advance(kColumns, kColumns);
  }
};
static inline bool can_decode_beside(const Rows& rows, int64_t col, int64_t cols) {
  return kDecodesBeside && rows.quantized && rows.quantized->cols % rows.quantized->blocksize == 0 &&
         rows.quantized->blocksize % kRun == 0 && col % kRun == 0 && cols % kRun == 0;
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
