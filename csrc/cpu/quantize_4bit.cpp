// 4-bit block quantisation, bit for bit as bitsandbytes does it on the CPU.
//
// Tiling: one task is about 64 Ki elements of whole blocks; a block (at most 4096 elements, 16 KB) is read twice, the
// second time from L1: once for its absmax, once to encode it. fp16 and bf16 blocks are widened into a 16 KB buffer.
// Bytes per element: 4 (or 2) read, 0.5 + 4 / blocksize written; at 4096 x 4096 fp32, block 64: 67.1 + 8.4 + 1.0 MB.
// Measured there, one Zen 4 core: 7.9 ms (AVX-512), 12.9 ms (AVX2); reading the weight alone (a sum) takes 2.7 ms, the
// search through the boundaries is the rest.
//
// What has to be the same bit for bit: a whole block is scaled by the fp32 reciprocal of max(absmax, 1e-38), and its
// absmax is stored as it is; the last, partial block is divided by max(absmax, 1e-38), and that is stored. NaN in a
// block makes its absmax NaN and all its codes those of index 15.
#include "convert.h"
#include "encode_4bit.h"
#include "isa_kernels.h"
#include "parallel.h"

namespace fusetune {
namespace FUSETUNE_ISA {
namespace {

constexpr int64_t kMaxBlock = 4096;
constexpr float kMinAbsmax = 1e-38f;

// Largest magnitude of n values; NaN where one is NaN: magnitudes order like their bits, NaN above all.
float absmax_of(const float* x, int64_t n) {
  int32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t magnitude = static_cast<int32_t>(float_to_bits(x[i]) & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
  }
  return bits_to_float(static_cast<uint32_t>(largest));
}

float at_least_min(float absmax) { return absmax < kMinAbsmax ? kMinAbsmax : absmax; }

float encode_block(const Encoder& encode, const float* x, int64_t n, uint8_t* packed) {
  const float absmax = absmax_of(x, n);
  const float scale = 1.0f / at_least_min(absmax);
  for (int64_t i = 0; i < n; i += 16) encode(x + i, scale, packed + i / 2);
  return absmax;
}

float encode_last_block(const Encoder& encode, const float* x, int64_t n, uint8_t* packed) {
  const float absmax = at_least_min(absmax_of(x, n));
  for (int64_t i = 0; i < n; i += 16) {
    float scaled[16] = {};  // an odd n is padded by a zero
    uint8_t bytes[8];
    const int64_t count = n - i < 16 ? n - i : 16;
    for (int64_t j = 0; j < count; ++j) scaled[j] = x[i + j] / absmax;
    encode(scaled, 1.0f, bytes);
    memcpy(packed + i / 2, bytes, static_cast<size_t>((count + 1) / 2));
  }
  return absmax;
}

}  // namespace

void quantize_4bit(const void* x, Dtype dtype, int64_t n, int quant_type, int64_t blocksize, uint8_t* packed,
                   float* absmax) {
  const Encoder encode(kBoundaries[quant_type]);
  const int64_t blocks = (n + blocksize - 1) / blocksize;
  const int64_t blocks_per_task = 65536 / blocksize;
  parallel_chunks((blocks + blocks_per_task - 1) / blocks_per_task, [&](int64_t task) {
    alignas(64) float buffer[kMaxBlock];
    const int64_t end = (task + 1) * blocks_per_task < blocks ? (task + 1) * blocks_per_task : blocks;
    for (int64_t b = task * blocks_per_task; b < end; ++b) {
      const int64_t first = b * blocksize, count = n - first < blocksize ? n - first : blocksize;
      const float* values = static_cast<const float*>(x) + first;
      if (dtype != Dtype::f32) {
        load_floats(x, dtype, first, count, buffer);
        values = buffer;
      }
      absmax[b] = count == blocksize ? encode_block(encode, values, count, packed + first / 2)
                                     : encode_last_block(encode, values, count, packed + first / 2);
    }
  });
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
