// What both passes of attention share: the operands of a head, and the scores of a block of queries.
//
// Tiling: 48 queries of a head at a time against all keys that any of them sees. Scores are outer.h's product of queries
// (broadcast, read in place) and of the keys' transpose (in vectors), which each task makes once. A prefix is further
// keys before the others: columns [0, prefix_width) of the scores, as far as it goes, and of the transposes.
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
static inline int64_t prefix_width(const Attention& a) { return whole_vectors(a.prefix.count); }
static inline int64_t scores_ld(const Attention& a) { return prefix_width(a) + padded(a.keys) + 16; }

// Which prefix a batch row has, -1 for none, and how many keys that is.
static inline int64_t prefix_of(const Attention& a, int64_t b) { return a.prefix.rows ? a.prefix.rows[b] : 0; }
static inline int64_t prefix_keys(const Attention& a, int64_t b) { return prefix_of(a, b) < 0 ? 0 : a.prefix.count; }

// Queries [first, first + queries) of a head, and how many keys they see.
struct Block {
  int64_t b, head, first, queries, keys;

  Block(const Attention& a, int64_t b, int64_t head, int64_t first)
      : b(b),
        head(head),
        first(first),
        queries(std::min(kQueries, a.tokens - first)),
        keys(a.causal ? std::min(a.keys, first + queries) : a.keys) {}

  int64_t width(const Attention& a) const { return prefix_width(a) + whole_vectors(keys); }
  int64_t row(const Attention& a) const { return (b * a.heads + head) * a.tokens + first; }
  // How many of the keys the block's query r sees.
  int64_t seen(const Attention& a, int64_t r) const { return a.causal ? std::min(keys, first + r + 1) : keys; }
  Matrix rows(const Heads& x) const { return rows_of(x, b, head, first); }
};

// The rows of a head in fp32, of which whole vectors can be read: in place, or in `buffer` [count, padded(D)].
static inline Floats2d head_rows(const Heads& x, int64_t b, int64_t head, int64_t count, int64_t dim, float* buffer) {
  return read_rows(rows_of(x, b, head, 0), 0, count, dim, buffer, true);
}

// A head's keys or values of the prefix of batch row b and of the tokens; buffer [P + S, padded(D)].
struct KeyRows {
  Floats2d prefix, tokens;
};
static inline KeyRows key_rows(const Attention& a, const Heads& prefix, const Heads& tokens, int64_t b, int64_t h,
                               float* buffer) {
  const int64_t count = prefix_keys(a, b);
  KeyRows rows{{}, head_rows(tokens, b, h, a.keys, a.dim, buffer + a.prefix.count * padded(a.dim))};
  if (count) rows.prefix = head_rows(prefix, prefix_of(a, b), h, count, a.dim, buffer);
  return rows;
}

// Their transpose [D, scores_ld] times factor.
static inline void transpose_keys(const Attention& a, const KeyRows& rows, int64_t b, float factor, float* to) {
  const int64_t ld = scores_ld(a), count = prefix_keys(a, b);
  if (count) transpose_rows(rows.prefix, count, a.dim, factor, to, ld);
  transpose_rows(rows.tokens, a.keys, a.dim, factor, to + prefix_width(a), ld);
}

// scores [queries, prefix_width + S], scores_ld apart, = scale q . k (+ bias); -inf for keys that a query does not see,
// up to the block's width. key_t: the keys' transpose, as far apart, times the scale.
static inline void block_scores(const Attention& a, const float* key_t, const Block& block, const Floats2d& q,
                                float* scores) {
  const int64_t ld = scores_ld(a), width = block.width(a), begin = prefix_width(a), joined = prefix_keys(a, block.b);
  Ahead nothing;
  outer({q.data, q.stride, 1}, block.queries, {key_t, ld}, width, a.dim, {scores, ld, nullptr, 0, nullptr}, nothing);
  for (int64_t r = 0; r < block.queries; ++r, scores += ld) {
    const int64_t seen = block.seen(a, r);
    float* const of_tokens = scores + begin;
    if (a.bias) {
      const float* bias = a.bias + block.b * a.bias_batch + block.head * a.bias_head + (block.first + r) * a.bias_token;
      for_vectors<1>(0, seen, [&](int64_t j, int lanes) {
        store(of_tokens + j, add(load(of_tokens + j), read(bias + j, lanes)));
      });
    }
    for (int64_t j = joined; j < begin; ++j) scores[j] = -INFINITY;
    for (int64_t j = begin + seen; j < width; ++j) scores[j] = -INFINITY;
  }
}

}  // namespace fusetune::FUSETUNE_ISA
