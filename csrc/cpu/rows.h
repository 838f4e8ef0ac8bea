// Reads rectangles of a weight as fp32: the one way the GEMM sees a weight, whatever it is stored in.
//
// The indirect call is made once per some thousand elements, so one compiled GEMM serves every storage.
#pragma once
#include <algorithm>

#include "isa/isa.h"
#include "kernels.h"

namespace fusetune {
namespace FUSETUNE_ISA {

// Rows lie kilobytes apart, which no hardware prefetcher follows: so many rows ahead are asked for.
constexpr int kPrefetchRows = 16;

struct Rows {
  using Read = void (*)(const Rows& self, int64_t row, int64_t rows, int64_t col, int64_t cols, float* dst,
                        int64_t stride);
  Read read_rows;
  const uint8_t* data;
  int64_t ld;   // elements from row to row
  float scale;  // dense: factor on every element
  Dtype dtype;  // dense
  const Weight4bit* quantized;
  int block_shift, nested_shift;  // log2 of the blocksizes
  Codebook code;

  // dst[r * stride + c] = element (row + r, col + c)
  void read(int64_t row, int64_t rows, int64_t col, int64_t cols, float* dst, int64_t stride) const {
    read_rows(*this, row, rows, col, cols, dst, stride);
  }
  // Whether the data are the elements as they are multiplied.
  bool plain() const { return !quantized && dtype == Dtype::f32 && scale == 1.f; }
};

template <class T>
static void read_dense(const Rows& self, int64_t row, int64_t rows, int64_t col, int64_t cols, float* dst,
                       int64_t stride) {
  const T* src = reinterpret_cast<const T*>(self.data) + row * self.ld + col;
  const F scale = set1(self.scale);
  const int rest = static_cast<int>(cols % kLanes);
  for (int64_t r = 0; r < rows; ++r, src += self.ld, dst += stride) {
    int64_t c = 0;
    for (; c + kLanes <= cols; c += kLanes) {
      __builtin_prefetch(src + kPrefetchRows / 2 * self.ld + c);
      store(dst + c, mul(load(src + c), scale));
    }
    if (rest) store_part(dst + c, mul(load_part(src + c, rest), scale), rest);
  }
}

template <bool nested>
FUSETUNE_INLINE float block_absmax(const Weight4bit& w, int nested_shift, uint64_t block) {
  if (!nested) return w.absmax[block];
  return w.nested_code[w.absmax_q[block]] * w.nested_absmax[block >> nested_shift] + w.nested_offset;
}

// A rectangle may cut blocks anywhere, a block may run over the end of a row, and with odd rows a byte may too. But
// 32 elements that begin at a multiple of 32 always lie in one block and in 16 whole bytes.
template <bool nested>
static void read_4bit(const Rows& self, int64_t row, int64_t rows, int64_t col, int64_t cols, float* dst,
                      int64_t stride) {
  constexpr int kVectors = 32 / kLanes;
  const Weight4bit w = *self.quantized;
  const Codebook code = self.code;
  const int shift = self.block_shift, nested_shift = self.nested_shift;
  const uint64_t ahead = static_cast<uint64_t>(kPrefetchRows * w.cols), count = static_cast<uint64_t>(cols);
  const auto decode_one = [&](uint64_t i) {
    const int nibble = i & 1 ? w.packed[i / 2] & 15 : w.packed[i / 2] >> 4;
    return w.code[nibble] * block_absmax<nested>(w, nested_shift, i >> shift);
  };
  for (int64_t r = 0; r < rows; ++r, dst += stride) {
    uint64_t i = static_cast<uint64_t>((row + r) * w.cols + col);  // index into the flattened weight
    const uint64_t end = i + count;
    for (uint64_t byte = (i + ahead) / 2; byte < (end + ahead) / 2; byte += 64) __builtin_prefetch(w.packed + byte);
    if (nested) {
      __builtin_prefetch(w.absmax_q + ((i + ahead) >> shift));
    } else {
      __builtin_prefetch(w.absmax + ((i + ahead) >> shift));
    }
    float* out = dst;
    for (; i < end && i % 32; ++i) *out++ = decode_one(i);
    while (i + 32 <= end) {
      const uint64_t block = i >> shift;
      const uint64_t stop = std::min((block + 1) << shift, end - 31);
      const ScaledCodebook scaled = scale_codebook(code, block_absmax<nested>(w, nested_shift, block));
      for (; i < stop; i += 32, out += 32) {
        F v[kVectors];
        decode32(w.packed + i / 2, scaled, v);
        for (int j = 0; j < kVectors; ++j) store(out + j * kLanes, v[j]);
      }
    }
    for (; i < end; ++i) *out++ = decode_one(i);
  }
}

static inline Rows dense_rows(const Matrix& m, float scale) {
  Rows rows{};
  rows.read_rows = m.dtype == Dtype::f32   ? read_dense<float>
                   : m.dtype == Dtype::f16 ? read_dense<f16>
                                           : read_dense<bf16>;
  rows.data = static_cast<const uint8_t*>(m.data);
  rows.ld = m.ld;
  rows.scale = scale;
  rows.dtype = m.dtype;
  return rows;
}

static inline Rows weight_rows(const Weight& w) {
  if (!w.quantized) return dense_rows(w.dense, 1.f);
  Rows rows{};
  rows.read_rows = w.quantized->absmax_q ? read_4bit<true> : read_4bit<false>;
  rows.data = w.quantized->packed;
  rows.ld = w.quantized->cols;
  rows.quantized = w.quantized;
  rows.block_shift = __builtin_ctzll(static_cast<unsigned long long>(w.quantized->blocksize));
  if (w.quantized->absmax_q) {
    rows.nested_shift = __builtin_ctzll(static_cast<unsigned long long>(w.quantized->nested_blocksize));
  }
  rows.code = make_codebook(w.quantized->code);
  return rows;
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
