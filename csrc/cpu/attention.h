// What both passes of attention with dropout of its weights share: the operands of a head, and the scores of a block of
// queries.
//
// Tiling: 48 queries of a head at a time against all keys that any of them sees. Scores are outer.h's product of queries
// (broadcast, read in place) and of the keys' transpose (in vectors), which each task makes once.
#pragma once
#include <algorithm>
#include <cmath>

#include "../parallel.h"
#include "dropout.h"
#include "elementwise.h"
#include "heads.h"
#include "outer.h"
#include "workspace.h"

namespace fusetune::FUSETUNE_ISA {

// Distance of two rows of scores, and of the keys' transpose: not a power of two, or they share a set of the cache.
static inline int64_t scores_ld(const Attention& a) { return padded(a.keys) + 16; }

// Queries [first, first + queries) of a head, and how many keys they see.
struct Block {
  int64_t b, head, first, queries, keys;

  Block(const Attention& a, int64_t b, int64_t head, int64_t first)
      : b(b),
        head(head),
        first(first),
        queries(std::min(kQueries, a.tokens - first)),
        keys(a.causal ? std::min(a.keys, first + queries) : a.keys) {}

  int64_t width() const { return whole_vectors(keys); }
  int64_t row(const Attention& a) const { return (b * a.heads + head) * a.tokens + first; }
  // How many of the keys the block's query r sees.
  int64_t seen(const Attention& a, int64_t r) const { return a.causal ? std::min(keys, first + r + 1) : keys; }
  Matrix rows(const Heads& x) const { return rows_of(x, b, head, first); }
};

// The rows of a head in fp32, of which whole vectors can be read: in place, or in `buffer` [count, padded(D)].
static inline Floats2d head_rows(const Heads& x, int64_t b, int64_t head, int64_t count, int64_t dim, float* buffer) {
  return read_rows(rows_of(x, b, head, 0), 0, count, dim, buffer, true);
}

// scores [queries, S], scores_ld apart, = scale q . k (+ bias); -inf for keys that a query does not see, up to the block's width.
// key_t: the keys' transpose [D, S], as far apart, times the scale.
static inline void block_scores(const Attention& a, const float* key_t, const Block& block, const Floats2d& q,
                                float* scores) {
  const int64_t ld = scores_ld(a), width = block.width();
  Ahead nothing;
  outer({q.data, q.stride, 1}, block.queries, {key_t, ld}, width, a.dim, {scores, ld, nullptr, 0, nullptr}, nothing);
  for (int64_t r = 0; r < block.queries; ++r, scores += ld) {
    const int64_t seen = block.seen(a, r);
    if (a.bias) {
      const float* bias = a.bias + block.b * a.bias_batch + block.head * a.bias_head + (block.first + r) * a.bias_token;
      for_vectors<1>(0, seen, [&](int64_t j, int lanes) { store(scores + j, add(load(scores + j), read(bias + j, lanes))); });
    }
    for (int64_t j = seen; j < width; ++j) scores[j] = -INFINITY;
  }
}

}  // namespace fusetune::FUSETUNE_ISA
