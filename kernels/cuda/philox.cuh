// The dropout mask, bit for bit that of pylib/reference/dropout.py: Philox4x32-10 keyed by the seed, counted by the
// element's index / 4; four consecutive elements take the four words of one counter.
#pragma once
#include <cstdint>

namespace fusetune {

struct Words4 {
  uint32_t word[4];
};

__device__ __forceinline__ Words4 philox(uint64_t counter, uint64_t seed) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t h0 = __umulhi(c0, 0xD2511F53u), l0 = c0 * 0xD2511F53u;
    const uint32_t h1 = __umulhi(c2, 0xCD9E8D57u), l1 = c2 * 0xCD9E8D57u;
    c0 = h1 ^ c1 ^ k0;
    c1 = l1;
    c2 = h0 ^ c3 ^ k1;
    c3 = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// An inverted dropout of elements of a matrix; seed null: none.
struct Dropout {
  const int64_t* seed;
  uint32_t threshold;
  float scale;

  // Factors of elements index .. index + 3; index is a multiple of 4.
  __device__ __forceinline__ void factors(int64_t index, float (&factor)[4]) const {
    const Words4 draw = philox(static_cast<uint64_t>(index) / 4, static_cast<uint64_t>(__ldg(seed)));
#pragma unroll
    for (int i = 0; i < 4; ++i) factor[i] = draw.word[i] >= threshold ? scale : 0.0f;
  }
};

}  // namespace fusetune
