// How linear_4bit.cuh reads a weight: chunks of R rows x 128 elements a warp, decoded into mma's operand.
//
// Tiling: lane t of a row's four owns 32 neighbouring elements, one unit, of a chunk. Bytes: 16 of codes a unit and row,
// in one load, and its absmax.
#pragma once
#include "codebook.cuh"

namespace fusetune {

constexpr int kChunk = 128;  // elements of K that a warp multiplies at a time

// A lane's part of a chunk of R weight rows: a unit of each, and what their absmax is computed from.
template <int R>
struct ChunkCodes {
  uint4 codes[R];
  Absmax::Raw absmax[R];
};

// Where a lane's R rows begin, in units. Rows past the end stand for the last: they are multiplied and not stored.
template <int R>
struct RowUnits {
  uint32_t first[R];
  uint32_t count;  // of a row

  __device__ __forceinline__ RowUnits(int64_t n0, int64_t n, int64_t k) : count(static_cast<uint32_t>(k / kUnit)) {
#pragma unroll
    for (int r = 0; r < R; ++r) first[r] = static_cast<uint32_t>(min(n0 + r, n - 1)) * count;
  }

  // Unit `unit` of all rows; past their end the last: x is zero there.
  __device__ __forceinline__ ChunkCodes<R> load(const uint8_t* __restrict__ packed, const Absmax& absmax,
                                                uint32_t unit) const {
    ChunkCodes<R> result;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const uint32_t at = first[r] + min(unit, count - 1);
      result.codes[r] = load_once(packed + 16 * uint64_t{at});
      result.absmax[r] = absmax.load(absmax.block_of(at));
    }
    return result;
  }
};

// Operands a of steps 2j and 2j + 1 of a chunk: word j of every row's codes, scaled and rounded to T.
template <class T, int MT>
__device__ __forceinline__ void decode_steps(uint32_t (&a)[2][MT][4], const ChunkCodes<2 * MT>& chunk,
                                             const float (&scale)[2 * MT], float table, int j) {
#pragma unroll
  for (int r = 0; r < 2 * MT; ++r) {
    const uint4& c = chunk.codes[r];
    const uint32_t word = j == 0 ? c.x : j == 1 ? c.y : j == 2 ? c.z : c.w;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const float v0 = lookup(table, word, shift_of(2 * pair)) * scale[r];
      const float v1 = lookup(table, word, shift_of(2 * pair + 1)) * scale[r];
      a[pair / 2][r / 2][r % 2 + 2 * (pair % 2)] = pack<T>(v0, v1);
    }
  }
}

}  // namespace fusetune
