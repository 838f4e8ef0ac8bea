// Launcher of dequantize_4bit; the kernel: kernels/cuda/dequantize_4bit.cuh.
#include "dequantize_4bit.cuh"

#include "launch.h"

namespace fusetune {
namespace {

template <class T>
int run(const FusetuneWeight4bit& w, void* out, cudaStream_t stream) {
  const int64_t n = w.n * w.k;
  if (n == 0) return cudaSuccess;
  // Long spans move the fewest bytes beside the weight; short ones fill the device.
  int span = kMaxSpan;
  while (span > 1024 && ceil_div(n, int64_t{span} * kDequantWarps) * 2 < 3 * multiprocessors()) span /= 2;
  span = std::max<int>(span, static_cast<int>(std::min<int64_t>(w.blocksize, kMaxSpan)));
  const int64_t blocks = ceil_div(n, int64_t{span} * kDequantWarps);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const bool aligned = reinterpret_cast<uintptr_t>(w.packed) % 4 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  dequantize_4bit<T><<<static_cast<unsigned>(blocks), 32 * kDequantWarps, 0, stream>>>(
      w.packed, w.codebook, w.absmax, w.absmax_codes, w.nested_code, w.nested_absmax, w.nested_offset,
      log2_of(w.blocksize), log2_of(w.nested_blocksize), n, span, aligned, static_cast<T*>(out));
  return cudaGetLastError();
}

}  // namespace
}  // namespace fusetune

using namespace fusetune;

extern "C" int fusetune_dequantize_4bit(const FusetuneWeight4bit* weight, void* out, int dtype, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (dtype == kFusetuneFloat32) return run<float>(*weight, out, on);
  if (dtype == kFusetuneFloat16) return run<__half>(*weight, out, on);
  if (dtype == kFusetuneBfloat16) return run<__nv_bfloat16>(*weight, out, on);
  return cudaErrorInvalidValue;
}
