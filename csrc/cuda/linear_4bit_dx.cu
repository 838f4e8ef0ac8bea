// Launchers of dx = dy W + mask (tail); the kernels and their tiling: kernels/cuda/linear_4bit_dx.cuh.
#include "linear_4bit_dx.cuh"

#include "launch.h"

namespace fusetune {
namespace {

struct Call {
  const void* dy;
  int64_t dy_pitch;
  int m;
  const FusetuneWeight4bit& w;
  FusetuneLowRank tail;
  FusetuneDropout dropout;
  void* dx;
  float* workspace;
  int splits;
  cudaStream_t stream;

  int64_t stages() const { return ceil_div(w.n, kStage); }
};

template <class T, int NT>
void launch(const Call& c) {
  const dim3 grid(static_cast<unsigned>(ceil_div(c.w.k, 128)), static_cast<unsigned>(ceil_div(c.m, 8 * NT)),
                  static_cast<unsigned>(c.splits));
  linear_4bit_dx<T, NT><<<grid, 128, 0, c.stream>>>(
      static_cast<const T*>(c.dy), c.dy_pitch, c.m, c.w.packed, c.w.codebook, c.w.absmax, c.w.absmax_codes,
      c.w.nested_code, c.w.nested_absmax, c.w.nested_offset, log2_of(c.w.blocksize), log2_of(c.w.nested_blocksize),
      c.w.n, c.w.k, c.tail.left, c.tail.right, c.tail.rank, c.tail.scale, c.dropout.seed, c.dropout.threshold,
      c.dropout.scale, static_cast<T*>(c.dx), c.splits > 1 ? c.workspace : nullptr,
      static_cast<int>(ceil_div(c.stages(), c.splits)));
}

template <class T>
int run(const Call& c) {
  const int tiles = row_tiles(c.m);
  if (tiles == 2) launch<T, 2>(c);
  if (tiles == 4) launch<T, 4>(c);
  if (tiles == 8) launch<T, 8>(c);
  if (c.splits > 1)
    sum_splits<T><<<sum_grid(c.m, c.w.k), 256, 0, c.stream>>>(c.workspace, c.splits, c.m, c.w.k, nullptr,
                                                               static_cast<T*>(c.dx));
  return cudaGetLastError();
}

}  // namespace
}  // namespace fusetune

using namespace fusetune;

extern "C" int fusetune_linear_4bit_dx_splits(int64_t m, int64_t n, int64_t k) {
  const int64_t tiles = ceil_div(k, 128) * ceil_div(m, 8 * row_tiles(m));
  return choose_splits(tiles, 2 * multiprocessors(), ceil_div(n, kStage), 4);
}

extern "C" int fusetune_linear_4bit_dx(const void* dy, int64_t dy_pitch, int dtype, int64_t m,
                                       const FusetuneWeight4bit* weight, const FusetuneLowRank* tail,
                                       const FusetuneDropout* dropout, void* dx, float* workspace, int splits,
                                       void* stream) {
  const Call call{dy,
                  dy_pitch,
                  static_cast<int>(m),
                  *weight,
                  tail ? *tail : FusetuneLowRank{},
                  dropout ? *dropout : FusetuneDropout{},
                  dx,
                  workspace,
                  splits,
                  static_cast<cudaStream_t>(stream)};
  if (m <= 0 || m > 65535 || splits < 1 || splits > call.stages() || (splits > 1 && !workspace))
    return cudaErrorInvalidValue;
  if (dtype == kFusetuneFloat16) return run<__half>(call);
  if (dtype == kFusetuneBfloat16) return run<__nv_bfloat16>(call);
  return cudaErrorInvalidValue;
}
