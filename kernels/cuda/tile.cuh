// What the matmuls with a 4-bit weight share: the low-rank tail, and how a warp's tile of results leaves it.
//
// A warp's tile: MT x NT results of mma, transposed, so that the decoded weight is the operand a and never leaves
// registers. Rows of an mma tile are output columns (of y: N, of dx: K), its columns are rows of x or dy (M). The
// 2 MT output columns of a lane are neighbours: lane g holds columns 2 MT g + c, c = 2 tile + half, of rows
// 8 nt + 2t + e, and stores them at once.
#pragma once
#include "ptx.cuh"

namespace fusetune {

// Where results go: rounded to out, with bias, or, where the inner dimension is split, as fp32 to this split's part of
// a workspace [splits, m, cols].
template <class T>
struct Output {
  T* out;  // [m, cols]
  float* partial;  // null: not split
  const float* bias;  // fp32 [cols] or null
  int m;
  int64_t cols;

  // Elements col .. col + 3 of a row, col a multiple of 4; what lies outside the matrix is left out.
  __device__ __forceinline__ void store(const float (&v)[4], int row, int64_t col, int split) const {
    if (row >= m) return;
    const bool whole = cols % 4 == 0 && col < cols;  // aligned as well, then
    if (partial) {
      float* to = partial + (static_cast<int64_t>(split) * m + row) * cols + col;
      if (whole) {
        *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
        return;
      }
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (col + c < cols) to[c] = v[c];
      return;
    }
    T* to = out + row * cols + col;
    float sum[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[c] = bias && col + c < cols ? v[c] + __ldg(bias + col + c) : v[c];
    if (whole) {
      *reinterpret_cast<uint2*>(to) = make_uint2(pack<T>(sum[0], sum[1]), pack<T>(sum[2], sum[3]));
      return;
    }
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (col + c < cols) to[c] = rounded<T>(sum[c]);
  }
};

// v as the sum of two numbers of type T, packed two by two: what tensor cores of 16 bits lose of an fp32 factor is
// multiplied on its own.
struct Halves {
  uint32_t high, low;
};

template <class T>
__device__ __forceinline__ Halves split(float v0, float v1) {
  const T h0 = rounded<T>(v0), h1 = rounded<T>(v1);
  return {pack<T>(v0, v1), pack<T>(v0 - static_cast<float>(h0), v1 - static_cast<float>(h1))};
}

// acc += right . left^T over `rank` terms, about as exact as in fp32.
// left(row of x, term) and right(column 0 .. 2 MT - 1 of this lane, term): factors in fp32; term < rank.
template <class T, int MT, int NT, class Left, class Right>
__device__ __forceinline__ void add_low_rank(float (&acc)[MT][NT][4], int rank, const Left& left, const Right& right) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll 1
  for (int first = 4 * t; first - 4 * t < rank; first += 16) {
    const auto term = [&](const auto& factor, int i, int j) {
      return first + j < rank ? factor(i, first + j) : 0.0f;
    };
    uint32_t high[MT][4], low[MT][4];
#pragma unroll
    for (int c = 0; c < 2 * MT; ++c) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const Halves v = split<T>(term(right, c, 2 * j), term(right, c, 2 * j + 1));
        high[c / 2][c % 2 + 2 * j] = v.high;
        low[c / 2][c % 2 + 2 * j] = v.low;
      }
    }
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      const int row = 8 * nt + g;
      const Halves b0 = split<T>(term(left, row, 0), term(left, row, 1));
      const Halves b1 = split<T>(term(left, row, 2), term(left, row, 3));
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        mma<T>(acc[i][nt], high[i], b0.low, b1.low);
        mma<T>(acc[i][nt], low[i], b0.high, b1.high);
        mma<T>(acc[i][nt], high[i], b0.high, b1.high);
      }
    }
  }
}

// Sums the parts of a split matmul in their order and finishes as Output does.
// Bytes: 4 splits m cols read, 2 m cols written. A CTA takes 1024 columns of row blockIdx.y, a thread four neighbouring
// ones.
template <class T>
__global__ void __launch_bounds__(256)
    sum_splits(const float* __restrict__ partial, int splits, int m, int64_t cols, const float* __restrict__ bias,
               T* __restrict__ out) {
  const int64_t col = 4 * (int64_t{blockIdx.x} * blockDim.x + threadIdx.x);
  const int64_t first = blockIdx.y * cols + col, part = m * cols;
  if (col >= cols) return;
  float sum[4] = {};
  if (cols % 4 == 0) {
#pragma unroll 4
    for (int split = 0; split < splits; ++split) {
      const float4 v = *reinterpret_cast<const float4*>(partial + split * part + first);
      sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
    }
  } else {
    for (int split = 0; split < splits; ++split) {
      for (int c = 0; c < 4; ++c)
        if (col + c < cols) sum[c] += partial[split * part + first + c];
    }
  }
  const Output<T> output{out, nullptr, bias, m, cols};
  output.store(sum, blockIdx.y, col, 0);
}

}  // namespace fusetune
