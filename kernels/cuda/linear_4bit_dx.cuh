// dx = dy W + mask (ds A) with a 4-bit W [N, K], K a multiple of 32, for few rows M. mask: the dropout's, or all ones.
//
// linear_4bit_dx<NT>, NT = 2, 4, 8: 128 columns of dx x 8 NT rows a CTA, 32 columns a warp; 64 rows of W a stage. Packed
// codes, dy and decoded absmax go through two buffers of shared memory. A lane decodes four neighbouring columns of
// eight rows of W at a time, in registers, in the order in which mma wants its operand: its inner index is permuted so
// that lane t owns rows 8t .. 8t + 7 of 32, and dy is read likewise, 16 bytes at a time.
// Bytes: (N K / 2 + absmax) ceil(M / 8 NT) + 2 M N (K / 128 times, from L2) + 2 M K.
//
// The low-rank tail comes first: its sum is masked where it is, in the accumulators, before dy W is added.
// The inner dimension N may be split among CTAs (gridDim.z): see Output and sum_splits in tile.cuh.
#pragma once
#include "codebook.cuh"
#include "philox.cuh"
#include "tile.cuh"

namespace fusetune {

constexpr int kStage = 64;  // rows of W, the inner dimension, in shared memory at a time

template <class T, int NT>
__global__ void __launch_bounds__(128, 2)
    linear_4bit_dx(const T* __restrict__ dy, int64_t dy_pitch, int m, const uint8_t* __restrict__ packed,
                   const float* __restrict__ codebook, const float* __restrict__ absmax,
                   const uint8_t* __restrict__ absmax_codes, const float* __restrict__ nested_code,
                   const float* __restrict__ nested_absmax, const float* __restrict__ nested_offset, int log2_block,
                   int log2_nested, int64_t n, int64_t k, const float* __restrict__ ds,
                   const float* __restrict__ lora_A, int rank, float tail_scale, const int64_t* __restrict__ seed,
                   uint32_t threshold, float keep_scale, T* __restrict__ dx, float* __restrict__ partial,
                   int stages_per_split) {
  if constexpr (kHasMma<T>) {
    constexpr int kRows = 8 * NT;
    constexpr int kPitch = kStage + 8;  // of scales: no two lanes of a store below meet in a bank
    __shared__ uint4 dys[2][kRows][8];
    __shared__ uint4 codes[2][kStage][4];
    __shared__ __align__(16) float scales[2][4][kPitch];
    __shared__ float nested[256];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int64_t k0 = blockIdx.x * int64_t{128} + 32 * warp + 4 * g;
    const int m0 = blockIdx.y * kRows;
    const int stages = static_cast<int>((n + kStage - 1) / kStage);
    const int begin = blockIdx.z * stages_per_split, end = min(begin + stages_per_split, stages);
    const Absmax stats{absmax,      absmax_codes, nested_absmax, nested, nested_offset ? __ldg(nested_offset) : 0.0f,
                       log2_block, log2_nested};

    // Of W a thread copies the unit of 32 columns number `run`, and its absmax, of every 32nd row.
    const int copy_row = threadIdx.x / 4, run = threadIdx.x % 4;
    const uint32_t row_units = static_cast<uint32_t>(k / kUnit), first_unit = 4 * blockIdx.x + run;
    // Units of 16 bytes trade places so that lanes that read or write together do not meet in a bank.
    const auto copy_dy = [&](int64_t n0, int buffer) {
#pragma unroll
      for (int i = 0; i < NT / 2; ++i) {
        const int index = threadIdx.x + 128 * i, row = index / 8, unit = index % 8;
        const bool valid = m0 + row < m && n0 + 8 * unit < n;  // dy is padded with zeros to a multiple of 8
        const T* from = valid ? dy + (m0 + row) * dy_pitch + n0 + 8 * unit : dy;
        copy_16(&dys[buffer][row][unit ^ ((row & 1) << 2)], from, valid);
      }
    };
    const auto copy_codes = [&](int64_t n0, int buffer) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = copy_row + 32 * i;
        const bool valid = n0 + row < n && first_unit < row_units;
        const uint32_t unit = static_cast<uint32_t>(n0 + row) * row_units + first_unit;
        const uint8_t* from = valid ? packed + 16 * uint64_t{unit} : packed;
        copy_16(&codes[buffer][row][run ^ ((row >> 3) & 3)], from, valid);
      }
    };
    const auto load_absmax = [&](int64_t n0, int i) {  // past an end: of something else, times zero
      const uint32_t row = static_cast<uint32_t>(min(n0 + copy_row + 32 * i, n - 1));
      return stats.load(stats.block_of(row * row_units + min(first_unit, row_units - 1)));
    };
    const auto store_absmax = [&](const Absmax::Raw& raw, int i, int buffer) {
      scales[buffer][run][copy_row + 32 * i] = stats.decode(raw);
    };

    copy_dy(int64_t{kStage} * begin, 0);
    copy_codes(int64_t{kStage} * begin, 0);
    const float table = codebook_lane(codebook);
    load_nested_code(nested, nested_code);
    __syncthreads();
    for (int i = 0; i < 2; ++i) store_absmax(load_absmax(int64_t{kStage} * begin, i), i, 0);

    float acc[2][NT][4] = {};
    if (rank && blockIdx.z == 0) {
      add_low_rank<T>(
          acc, rank,
          [&](int row, int i) { return m0 + row < m ? tail_scale * __ldg(ds + int64_t{m0 + row} * rank + i) : 0.0f; },
          [&](int c, int i) { return k0 + c < k ? __ldg(lora_A + i * k + k0 + c) : 0.0f; });
      if (seed) {
        const Dropout dropout{seed, threshold, keep_scale};
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float factor[4];
            dropout.factors((m0 + 8 * nt + 2 * t + e) * k + k0, factor);
#pragma unroll
            for (int c = 0; c < 4; ++c) acc[c / 2][nt][e + 2 * (c % 2)] *= factor[c];
          }
        }
      }
    }
    for (int stage = begin; stage < end; ++stage) {
      const int buffer = (stage - begin) % 2;
      copies_wait();
      __syncthreads();  // this stage is there, and the other buffer has been used
      const bool more = stage + 1 < end;
      const int64_t following = int64_t{kStage} * (stage + 1);
      Absmax::Raw raw[2] = {};
      if (more) {
        copy_dy(following, 1 - buffer);
        copy_codes(following, 1 - buffer);
        for (int i = 0; i < 2; ++i) raw[i] = load_absmax(following, i);
      }
#pragma unroll
      for (int part = 0; part < 2; ++part) {  // rows 32 part + 8t + i of the stage
        const int row = 32 * part + 8 * t;
        uint32_t a[2][2][4];
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const float4 four = *reinterpret_cast<const float4*>(&scales[buffer][warp][row + 4 * step]);
          const float scale[4] = {four.x, four.y, four.z, four.w};
          float w[4][4];  // [row][column]
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint4* unit = &codes[buffer][row + 4 * step + i][warp ^ t];
            const uint32_t word = reinterpret_cast<const uint16_t*>(unit)[g];
#pragma unroll
            for (int c = 0; c < 4; ++c) w[i][c] = lookup(table, word, shift_of(c)) * scale[i];
          }
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            a[step][c / 2][c % 2] = pack<T>(w[0][c], w[1][c]);
            a[step][c / 2][c % 2 + 2] = pack<T>(w[2][c], w[3][c]);
          }
        }
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          const uint4 b = dys[buffer][8 * nt + g][(4 * part + t) ^ ((g & 1) << 2)];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            mma<T>(acc[i][nt], a[0][i], b.x, b.y);
            mma<T>(acc[i][nt], a[1][i], b.z, b.w);
          }
        }
      }
      if (more)
        for (int i = 0; i < 2; ++i) store_absmax(raw[i], i, 1 - buffer);
    }

    const Output<T> output{dx, partial, nullptr, m, k};
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float v[4] = {acc[0][nt][e], acc[0][nt][e + 2], acc[1][nt][e], acc[1][nt][e + 2]};
        output.store(v, m0 + 8 * nt + 2 * t + e, k0, blockIdx.z);
      }
    }
  }
}

}  // namespace fusetune
