// The values of 4-bit codes: codebook[code] * absmax of the block, in fp32, as bitsandbytes computes them.
//
// Look-up: every lane keeps codebook[lane % 16] in a register and a value comes by shuffle from the lane of its code.
// That is one shift and one shuffle a value; it needs no shared memory, so it has no bank conflicts, no table to fill,
// and no local memory. A shuffle looks at the low five bits of its index only, and the table repeats after 16 lanes,
// so the code need not be masked either.
#pragma once
#include "ptx.cuh"

namespace fusetune {

constexpr unsigned kAllLanes = 0xffffffffu;

// The codebook as `lookup` wants it; codebook: 16 values.
__device__ __forceinline__ float codebook_lane(const float* __restrict__ codebook) {
  return __ldg(codebook + (threadIdx.x & 15));
}

// The value of the code in bits [shift, shift + 4) of word, before scaling. All 32 lanes take part.
__device__ __forceinline__ float lookup(float table, uint32_t word, int shift) {
  return __shfl_sync(kAllLanes, table, static_cast<int>(word >> shift));
}

// A packed byte holds the earlier of two elements in its high nibble: bit of element `i` of a little-endian word.
__host__ __device__ constexpr int shift_of(int i) { return 8 * (i / 2) + (i % 2 ? 0 : 4); }

// Weights are addressed in units of 32 elements, 16 bytes of codes: no block of absmax is smaller, and the number of a
// unit fits in 32 bits where that of an element need not.
constexpr int kUnit = 32;
constexpr int kLog2Unit = 5;

// The statistics of a weight's blocks. Plain: `plain` holds absmax. Nested: `plain` is null and
// absmax = code[codes[i]] * scales[i / nested block] + offset, with `code` a copy of the 256 values in shared memory.
struct Absmax {
  const float* __restrict__ plain;
  const uint8_t* __restrict__ codes;
  const float* __restrict__ scales;
  const float* code;
  float offset;
  int log2_block, log2_nested;

  // What a block's absmax is computed from: loaded early, decoded when it is needed.
  struct Raw {
    float number;
    uint32_t code;
  };

  __device__ __forceinline__ Raw load(uint32_t block) const {
    if (plain) return {__ldg(plain + block), 0};
    return {__ldg(scales + (block >> log2_nested)), __ldg(codes + block)};
  }

  // Product and sum are rounded one by one: bitsandbytes computes them in two kernels.
  __device__ __forceinline__ float decode(const Raw& raw) const {
    if (plain) return raw.number;
    return __fadd_rn(__fmul_rn(code[raw.code], raw.number), offset);
  }

  // Number of the block that a unit of the flattened weight lies in.
  __device__ __forceinline__ uint32_t block_of(uint32_t unit) const { return unit >> (log2_block - kLog2Unit); }
};

// Copies the nested code to shared memory; a barrier must follow before it is used. Any number of threads.
__device__ __forceinline__ void load_nested_code(float (&shared)[256], const float* __restrict__ code) {
  if (code == nullptr) return;
  for (int i = threadIdx.x; i < 256; i += blockDim.x) shared[i] = __ldg(code + i);
}

}  // namespace fusetune
