// The whole contract of the CUDA kernels: C functions on device pointers, sizes and a stream. They launch and return a
// cudaError_t as int, 0 for success; nothing waits, nothing is allocated, so that a stream may be captured.
// Launchers trust their caller (pylib/ops/_cuda.py) in what their comments demand; null stands for "none".
#pragma once
#include <cstdint>

extern "C" {

enum FusetuneDtype { kFusetuneFloat32 = 0, kFusetuneFloat16 = 1, kFusetuneBfloat16 = 2 };

// A 4-bit weight [n, k] in bitsandbytes' layout. Plain: absmax. Nested: absmax null and the four others, with
// absmax[i] = nested_code[absmax_codes[i]] * nested_absmax[i / nested_blocksize] + *nested_offset.
// Both block sizes are powers of two, blocksize at least 32. n * k is less than 2^37.
struct FusetuneWeight4bit {
  const uint8_t* packed;
  const float* codebook;  // 16 values
  const float* absmax;
  const uint8_t* absmax_codes;
  const float* nested_code;  // 256 values
  const float* nested_absmax;
  const float* nested_offset;
  int64_t blocksize, nested_blocksize;
  int64_t n, k;
};

// out += scale * left . right, fp32: forward left = s [m, rank], right = lora_B [n, rank], transposed; backward
// left = ds [m, rank], right = lora_A [rank, k]. rank 0: nothing.
struct FusetuneLowRank {
  const float* left;
  const float* right;
  int rank;
  float scale;
};

// Inverted dropout of the tail of dx; seed null: none. The generator: pylib/reference/dropout.py.
struct FusetuneDropout {
  const int64_t* seed;
  uint32_t threshold;
  float scale;
};

// Devices that can be used; error: why not (0 and no device: none is there).
int fusetune_device_count(int* error);
const char* fusetune_error_string(int error);
// Ten times the major plus the minor compute capability of the current device.
int fusetune_capability();
// Whether this build has code for devices of that capability: 1 or 0.
int fusetune_has_code(int capability);

// Into how many parts the inner dimension of linear_4bit, and of linear_4bit_dx, is best split on the current device.
// More than one needs a workspace of splits * m * n (dx: k) fp32 numbers, aligned to 16 bytes.
int fusetune_linear_4bit_splits(int64_t m, int64_t n, int64_t k, int dtype);
int fusetune_linear_4bit_dx_splits(int64_t m, int64_t n, int64_t k);

// y [m, n] = x [m, k] W^T + tail + bias, contiguous, in x's dtype; bias fp32. fp16 and bf16 (sm_80 and newer) for any
// m; fp32 for m <= 8 and splits = 1. k > 0 a multiple of 32; x, its rows and packed aligned to 16 bytes.
int fusetune_linear_4bit(const void* x, int64_t x_pitch, int dtype, int64_t m, const FusetuneWeight4bit* weight,
                         const FusetuneLowRank* tail, const float* bias, void* y, float* workspace, int splits,
                         void* stream);

// dx [m, k] = dy [m, n] W + mask (tail), contiguous, in dy's dtype, fp16 or bf16. k > 0 a multiple of 32; dy, its rows
// and packed aligned to 16 bytes; rows of dy are readable, and zero, up to a multiple of 8 elements.
int fusetune_linear_4bit_dx(const void* dy, int64_t dy_pitch, int dtype, int64_t m, const FusetuneWeight4bit* weight,
                            const FusetuneLowRank* tail, const FusetuneDropout* dropout, void* dx, float* workspace,
                            int splits, void* stream);

// out: the n * k values of the weight, in the given dtype. Any size and alignment (of elements).
int fusetune_dequantize_4bit(const FusetuneWeight4bit* weight, void* out, int dtype, void* stream);
}
