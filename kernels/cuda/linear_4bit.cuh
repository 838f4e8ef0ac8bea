// y = x W^T + s B^T + bias with a 4-bit W [N, K], K a multiple of 32, for few rows M.
//
// The weight is read once for every 64 rows, straight from its packed form, 16 bytes a load, and decoded in registers
// in just the order in which mma wants its operand: the inner index of mma is permuted so that lane t of a row's four
// owns 32 neighbouring elements of a chunk of 128 (step j of eight takes its elements 4j .. 4j + 3). x is read by the
// same permutation, again 16 bytes a time. Every 32 elements lie in one block of absmax.
//
//   linear_4bit_stream, M <= 8: 16 output columns a CTA; its 8 warps take chunks in turn and are added at the end.
//     Bytes: N K / 2 + absmax + 2 M K (N / 16 times, from L2) + 2 M N.
//   linear_4bit_tile<NT>, NT = 2, 4, 8: 128 output columns x 8 NT rows a CTA, 32 columns a warp; x goes through two
//     buffers of shared memory. Bytes: (N K / 2 + absmax) ceil(M / 8 NT) + 2 M K (N / 128 times, from L2) + 2 M N.
//   linear_4bit_fp32, M <= 8: fp32 FMA; two output columns a warp. Bytes: N K / 2 + absmax + 4 M K (N / 2 times, from
//     L1 and L2) + 4 M N.
//
// The inner dimension may be split among CTAs (gridDim.z): see Output and sum_splits in tile.cuh.
#pragma once
#include "chunk.cuh"
#include "tile.cuh"

namespace fusetune {

template <class T>
__global__ void __launch_bounds__(256, 3)
    linear_4bit_stream(const T* __restrict__ x, int64_t x_pitch, int m, const uint8_t* __restrict__ packed,
                       const float* __restrict__ codebook, const float* __restrict__ absmax,
                       const uint8_t* __restrict__ absmax_codes, const float* __restrict__ nested_code,
                       const float* __restrict__ nested_absmax, const float* __restrict__ nested_offset,
                       int log2_block, int log2_nested, int64_t n, int64_t k, const float* __restrict__ s,
                       const float* __restrict__ lora_B, int rank, float tail_scale, const float* __restrict__ bias,
                       T* __restrict__ y, float* __restrict__ partial, int chunks_per_split) {
  if constexpr (kHasMma<T>) {
    constexpr int kWarps = 8, kPitch = 20;  // of sums: no two lanes of a store or load below meet in a bank
    __shared__ float nested[256];
    __shared__ __align__(8) float sums[kWarps][8 * kPitch];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int64_t n0 = blockIdx.x * int64_t{16} + 2 * g;
    const int begin = blockIdx.z * chunks_per_split;
    const int chunks = static_cast<int>((k + kChunk - 1) / kChunk);
    const int end = min(begin + chunks_per_split, chunks);
    const Absmax stats{absmax,      absmax_codes, nested_absmax, nested, nested_offset ? __ldg(nested_offset) : 0.0f,
                       log2_block, log2_nested};

    const RowUnits<2> units(n0, n, k);
    const T* x_row = x + min(g, m - 1) * x_pitch;  // what rows past the end give is not stored
    int chunk = begin + warp;
    bool more = chunk < end;
    ChunkCodes<2> current, next;
    if (more) current = units.load(packed, stats, 4 * chunk + t);
    const float table = codebook_lane(codebook);
    load_nested_code(nested, nested_code);
    __syncthreads();

    float acc[1][1][4] = {};
    if (rank && warp == 0 && blockIdx.z == 0) {
      add_low_rank<T>(
          acc, rank, [&](int row, int i) { return row < m ? tail_scale * __ldg(s + int64_t{row} * rank + i) : 0.0f; },
          [&](int c, int i) { return n0 + c < n ? __ldg(lora_B + (n0 + c) * rank + i) : 0.0f; });
    }
    while (more) {
      const uint32_t unit = 4 * chunk + t;
      uint4 rows[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint4* from = reinterpret_cast<const uint4*>(x_row + kUnit * uint64_t{unit}) + j;
        rows[j] = unit < units.count ? __ldg(from) : make_uint4(0, 0, 0, 0);
      }
      chunk += kWarps;
      more = chunk < end;
      if (more) next = units.load(packed, stats, 4 * chunk + t);
      const float scale[2] = {stats.decode(current.absmax[0]), stats.decode(current.absmax[1])};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t a[2][1][4];
        decode_steps<T, 1>(a, current, scale, table, j);
        mma<T>(acc[0][0], a[0][0], rows[j].x, rows[j].y);
        mma<T>(acc[0][0], a[1][0], rows[j].z, rows[j].w);
      }
      if (more) current = next;
    }

    float* mine = sums[warp] + 2 * t * kPitch + 2 * g;
    *reinterpret_cast<float2*>(mine) = make_float2(acc[0][0][0], acc[0][0][2]);
    *reinterpret_cast<float2*>(mine + kPitch) = make_float2(acc[0][0][1], acc[0][0][3]);
    __syncthreads();
    if (warp >= 4) return;
    const int row = 2 * (lane / 8) + warp % 2, c = lane % 8 + 8 * (warp / 2);
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[w][row * kPitch + c];
    const int64_t column = blockIdx.x * int64_t{16} + c;
    if (row >= m || column >= n) return;
    if (partial) {
      partial[(int64_t{blockIdx.z} * m + row) * n + column] = sum;
    } else {
      y[row * n + column] = rounded<T>(bias ? sum + __ldg(bias + column) : sum);
    }
  }
}

// Place of a 16-byte unit of row `row` in shared memory, rows of 16 units: neither the lanes that read units 4t + j of
// two rows nor those that write eight neighbouring ones meet in a bank.
__device__ __forceinline__ int place_of(int row, int unit) { return unit ^ ((unit >> 2) & 2) ^ (row & 1); }

template <class T, int NT>
__global__ void __launch_bounds__(128, 2)
    linear_4bit_tile(const T* __restrict__ x, int64_t x_pitch, int m, const uint8_t* __restrict__ packed,
                     const float* __restrict__ codebook, const float* __restrict__ absmax,
                     const uint8_t* __restrict__ absmax_codes, const float* __restrict__ nested_code,
                     const float* __restrict__ nested_absmax, const float* __restrict__ nested_offset, int log2_block,
                     int log2_nested, int64_t n, int64_t k, const float* __restrict__ s,
                     const float* __restrict__ lora_B, int rank, float tail_scale, const float* __restrict__ bias,
                     T* __restrict__ y, float* __restrict__ partial, int chunks_per_split) {
  if constexpr (kHasMma<T>) {
    constexpr int kRows = 8 * NT;
    __shared__ uint4 xs[2][kRows][16];
    __shared__ float nested[256];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int64_t n0 = blockIdx.x * int64_t{128} + 32 * warp + 4 * g;
    const int m0 = blockIdx.y * kRows;
    const int chunks = static_cast<int>((k + kChunk - 1) / kChunk);
    const int begin = blockIdx.z * chunks_per_split, end = min(begin + chunks_per_split, chunks);
    const Absmax stats{absmax,      absmax_codes, nested_absmax, nested, nested_offset ? __ldg(nested_offset) : 0.0f,
                       log2_block, log2_nested};

    const RowUnits<4> units(n0, n, k);
    // A thread copies 16 bytes of every eighth row: 8 elements of column 8 (threadIdx.x % 16) of a chunk.
    const int copy_row = threadIdx.x / 16, copy_column = 8 * (threadIdx.x % 16);
    const T* copy_from = x + (m0 + copy_row) * x_pitch + copy_column;
    const auto copy_x = [&](int chunk, int buffer) {
      const int64_t column = int64_t{kChunk} * chunk;
#pragma unroll
      for (int i = 0; i < NT; ++i) {
        const bool valid = m0 + copy_row + 8 * i < m && column + copy_column < k;
        uint4* to = &xs[buffer][copy_row + 8 * i][place_of(copy_row, threadIdx.x % 16)];
        copy_16(to, valid ? copy_from + 8 * i * x_pitch + column : x, valid);
      }
    };
    copy_x(begin, 0);
    ChunkCodes<4> current = units.load(packed, stats, 4 * begin + t), next;
    const float table = codebook_lane(codebook);
    load_nested_code(nested, nested_code);

    float acc[2][NT][4] = {};
    if (rank && blockIdx.z == 0) {
      add_low_rank<T>(
          acc, rank,
          [&](int row, int i) { return m0 + row < m ? tail_scale * __ldg(s + int64_t{m0 + row} * rank + i) : 0.0f; },
          [&](int c, int i) { return n0 + c < n ? __ldg(lora_B + (n0 + c) * rank + i) : 0.0f; });
    }
    for (int chunk = begin; chunk < end; ++chunk) {
      const int buffer = (chunk - begin) % 2;
      copies_wait();
      __syncthreads();  // this chunk's x is there, and the other buffer's has been used
      const bool more = chunk + 1 < end;
      if (more) {
        copy_x(chunk + 1, 1 - buffer);
        next = units.load(packed, stats, 4 * (chunk + 1) + t);
      }
      float scale[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) scale[r] = stats.decode(current.absmax[r]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t a[2][2][4];
        decode_steps<T, 2>(a, current, scale, table, j);
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          const uint4 b = xs[buffer][8 * nt + g][place_of(g, 4 * t + j)];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            mma<T>(acc[i][nt], a[0][i], b.x, b.y);
            mma<T>(acc[i][nt], a[1][i], b.z, b.w);
          }
        }
      }
      if (more) current = next;
    }

    const Output<T> output{y, partial, bias, m, n};
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float v[4] = {acc[0][nt][e], acc[0][nt][e + 2], acc[1][nt][e], acc[1][nt][e + 2]};
        output.store(v, m0 + 8 * nt + 2 * t + e, n0, blockIdx.z);
      }
    }
  }
}

// A lane takes 8 neighbouring elements of a chunk of 256; every lane ends up with the sums of the warp.
__global__ void __launch_bounds__(256)
    linear_4bit_fp32(const float* __restrict__ x, int64_t x_pitch, int m, const uint8_t* __restrict__ packed,
                     const float* __restrict__ codebook, const float* __restrict__ absmax,
                     const uint8_t* __restrict__ absmax_codes, const float* __restrict__ nested_code,
                     const float* __restrict__ nested_absmax, const float* __restrict__ nested_offset, int log2_block,
                     int log2_nested, int64_t n, int64_t k, const float* __restrict__ s,
                     const float* __restrict__ lora_B, int rank, float tail_scale, const float* __restrict__ bias,
                     float* __restrict__ y) {
  constexpr int kColumns = 2, kMaxRows = 8;
  __shared__ float nested[256];
  load_nested_code(nested, nested_code);
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t n0 = (blockIdx.x * int64_t{8} + warp) * kColumns;
  if (n0 >= n) return;
  const Absmax stats{absmax,      absmax_codes, nested_absmax, nested, nested_offset ? __ldg(nested_offset) : 0.0f,
                     log2_block, log2_nested};
  const float table = codebook_lane(codebook);
  float acc[kColumns][kMaxRows] = {};
  for (int64_t first = 0; first < k; first += 256) {
    const int64_t column = first + 8 * lane;
    const bool valid = column < k;
    float w[kColumns][8];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int64_t element = min(n0 + c, n - 1) * k + min(column, k - 8);  // past the end x is not read
      const uint32_t word = __ldg(reinterpret_cast<const uint32_t*>(packed + element / 2));
      const float scale = stats.decode(stats.load(stats.block_of(static_cast<uint32_t>(element / kUnit))));
#pragma unroll
      for (int i = 0; i < 8; ++i) w[c][i] = lookup(table, word, shift_of(i)) * scale;
    }
    if (!valid) continue;
#pragma unroll
    for (int row = 0; row < kMaxRows; ++row) {
      if (row >= m) break;
      const float4* from = reinterpret_cast<const float4*>(x + row * x_pitch + column);
      const float4 lo = __ldg(from), hi = __ldg(from + 1);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        float& sum = acc[c][row];
        sum = fmaf(lo.x, w[c][0], sum), sum = fmaf(lo.y, w[c][1], sum);
        sum = fmaf(lo.z, w[c][2], sum), sum = fmaf(lo.w, w[c][3], sum);
        sum = fmaf(hi.x, w[c][4], sum), sum = fmaf(hi.y, w[c][5], sum);
        sum = fmaf(hi.z, w[c][6], sum), sum = fmaf(hi.w, w[c][7], sum);
      }
    }
  }
  float mine = 0;  // the sum that this lane finishes: of column lane / 8, row lane % 8
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
#pragma unroll
    for (int row = 0; row < kMaxRows; ++row) {
      float sum = acc[c][row];
#pragma unroll
      for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
      if (lane == c * kMaxRows + row) mine = sum;
    }
  }
  const int row = lane % kMaxRows;
  const int64_t column = n0 + lane / kMaxRows;
  if (lane >= kColumns * kMaxRows || row >= m || column >= n) return;
  float tail = 0;
  for (int i = 0; i < rank; ++i) tail = fmaf(__ldg(s + row * rank + i), __ldg(lora_B + column * rank + i), tail);
  mine = fmaf(tail_scale, tail, mine);
  y[row * n + column] = bias ? mine + __ldg(bias + column) : mine;
}

}  // namespace fusetune
