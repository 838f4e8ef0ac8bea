// Launchers of y = x W^T + tail + bias; the kernels and their tilings: kernels/cuda/linear_4bit.cuh.
#include "linear_4bit.cuh"

#include "launch.h"

namespace fusetune {
namespace {

struct Call {
  const void* x;
  int64_t x_pitch;
  int m;
  const FusetuneWeight4bit& w;
  FusetuneLowRank tail;
  const float* bias;
  void* y;
  float* workspace;
  int splits;
  cudaStream_t stream;

  int64_t chunks() const { return ceil_div(w.k, kChunk); }
  int chunks_per_split() const { return static_cast<int>(ceil_div(chunks(), splits)); }
};

template <class T, class Kernel>
void launch(const Call& c, Kernel kernel, dim3 grid, int threads) {
  kernel<<<grid, threads, 0, c.stream>>>(
      static_cast<const T*>(c.x), c.x_pitch, c.m, c.w.packed, c.w.codebook, c.w.absmax, c.w.absmax_codes,
      c.w.nested_code, c.w.nested_absmax, c.w.nested_offset, log2_of(c.w.blocksize), log2_of(c.w.nested_blocksize),
      c.w.n, c.w.k, c.tail.left, c.tail.right, c.tail.rank, c.tail.scale, c.bias, static_cast<T*>(c.y),
      c.splits > 1 ? c.workspace : nullptr, c.chunks_per_split());
}

template <class T>
int run(const Call& c) {
  const auto splits = static_cast<unsigned>(c.splits);
  if (c.m <= 8) {
    launch<T>(c, linear_4bit_stream<T>, dim3(static_cast<unsigned>(ceil_div(c.w.n, 16)), 1, splits), 256);
  } else {
    const int tiles = row_tiles(c.m);
    const dim3 grid(static_cast<unsigned>(ceil_div(c.w.n, 128)), static_cast<unsigned>(ceil_div(c.m, 8 * tiles)),
                    splits);
    if (tiles == 2) launch<T>(c, linear_4bit_tile<T, 2>, grid, 128);
    if (tiles == 4) launch<T>(c, linear_4bit_tile<T, 4>, grid, 128);
    if (tiles == 8) launch<T>(c, linear_4bit_tile<T, 8>, grid, 128);
  }
  if (c.splits > 1)
    sum_splits<T><<<sum_grid(c.m, c.w.n), 256, 0, c.stream>>>(c.workspace, c.splits, c.m, c.w.n, c.bias,
                                                               static_cast<T*>(c.y));
  return cudaGetLastError();
}

int run_fp32(const Call& c) {
  if (c.m > 8 || c.splits != 1) return cudaErrorInvalidValue;
  linear_4bit_fp32<<<static_cast<unsigned>(ceil_div(c.w.n, 16)), 256, 0, c.stream>>>(
      static_cast<const float*>(c.x), c.x_pitch, c.m, c.w.packed, c.w.codebook, c.w.absmax, c.w.absmax_codes,
      c.w.nested_code, c.w.nested_absmax, c.w.nested_offset, log2_of(c.w.blocksize), log2_of(c.w.nested_blocksize),
      c.w.n, c.w.k, c.tail.left, c.tail.right, c.tail.rank, c.tail.scale, c.bias, static_cast<float*>(c.y));
  return cudaGetLastError();
}

}  // namespace
}  // namespace fusetune

using namespace fusetune;

extern "C" int fusetune_linear_4bit_splits(int64_t m, int64_t n, int64_t k, int dtype) {
  if (dtype == kFusetuneFloat32) return 1;
  const int64_t chunks = ceil_div(k, kChunk);
  // Few rows: a CTA's eight warps share its columns' chunks already.
  if (m <= 8) return choose_splits(ceil_div(n, 16), multiprocessors() / 2, chunks, 16);
  const int64_t tiles = ceil_div(n, 128) * ceil_div(m, 8 * row_tiles(m));
  return choose_splits(tiles, 2 * multiprocessors(), chunks, 2);
}

extern "C" int fusetune_linear_4bit(const void* x, int64_t x_pitch, int dtype, int64_t m,
                                    const FusetuneWeight4bit* weight, const FusetuneLowRank* tail, const float* bias,
                                    void* y, float* workspace, int splits, void* stream) {
  const Call call{x,    x_pitch, static_cast<int>(m), *weight, tail ? *tail : FusetuneLowRank{},
                  bias, y,       workspace,           splits,  static_cast<cudaStream_t>(stream)};
  if (m <= 0 || m > 65535 || splits < 1 || splits > call.chunks() || (splits > 1 && !workspace))
    return cudaErrorInvalidValue;
  if (dtype == kFusetuneFloat32) return run_fp32(call);
  if (dtype == kFusetuneFloat16) return run<__half>(call);
  if (dtype == kFusetuneBfloat16) return run<__nv_bfloat16>(call);
  return cudaErrorInvalidValue;
}
