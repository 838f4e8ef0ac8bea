// A 4-bit weight of any size to fp32, fp16 or bf16, nested statistics included: one launch.
//
// A warp decodes `span` neighbouring elements. First it turns the absmax of its span's blocks into fp32 in shared
// memory; then a lane takes V neighbouring elements at a time (8 of two bytes, 4 of four), so that a warp's loads of
// codes and its 16-byte stores are contiguous.
// Bytes: n / 2 + absmax + n sizeof(T), and 1 KB of nested code for every CTA.
#pragma once
#include "codebook.cuh"

namespace fusetune {

constexpr int kDequantWarps = 8;
constexpr int kMaxSpan = 8192;

template <class T>
__global__ void __launch_bounds__(32 * kDequantWarps)
    dequantize_4bit(const uint8_t* __restrict__ packed, const float* __restrict__ codebook,
                    const float* __restrict__ absmax, const uint8_t* __restrict__ absmax_codes,
                    const float* __restrict__ nested_code, const float* __restrict__ nested_absmax,
                    const float* __restrict__ nested_offset, int log2_block, int log2_nested, int64_t n, int span,
                    bool aligned, T* __restrict__ out) {
  constexpr int V = 16 / sizeof(T);
  using Codes = std::conditional_t<V == 8, uint32_t, uint16_t>;
  __shared__ float nested[256];
  __shared__ float scales[kDequantWarps][kMaxSpan / kUnit];
  load_nested_code(nested, nested_code);
  const float table = codebook_lane(codebook);
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t begin = (int64_t{blockIdx.x} * kDequantWarps + warp) * span;
  if (begin >= n) return;
  const int64_t end = min(begin + span, n);
  const Absmax stats{absmax,      absmax_codes, nested_absmax, nested, nested_offset ? __ldg(nested_offset) : 0.0f,
                     log2_block, log2_nested};
  const uint32_t first_block = static_cast<uint32_t>(begin >> log2_block);
  const int blocks = static_cast<int>(static_cast<uint32_t>((end - 1) >> log2_block) - first_block) + 1;
  for (int i = lane; i < blocks; i += 32) scales[warp][i] = stats.decode(stats.load(first_block + i));
  __syncwarp();
  const int64_t block_begin = int64_t{first_block} << log2_block;

#pragma unroll 4
  for (int64_t base = begin; base < end; base += 32 * V) {
    const int64_t i = base + lane * V;
    const bool whole = aligned && i + V <= end;
    uint32_t word = 0;
    if (whole) {
      word = __ldg(reinterpret_cast<const Codes*>(packed + i / 2));
    } else {
      for (int byte = 0; byte < V / 2; ++byte)
        if (i + 2 * byte < end) word |= uint32_t{__ldg(packed + i / 2 + byte)} << (8 * byte);
    }
    const float scale = i < end ? scales[warp][static_cast<int>((i - block_begin) >> log2_block)] : 0.0f;
    T v[V];
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = rounded<T>(lookup(table, word, shift_of(j)) * scale);
    if (whole) {
      *reinterpret_cast<uint4*>(out + i) = *reinterpret_cast<const uint4*>(v);
      continue;
    }
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (i + j < end) out[i + j] = v[j];
  }
}

}  // namespace fusetune
