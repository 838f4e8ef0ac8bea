// What both passes of attention to a prefix share: its keys and values laid out for the products, and the scores of a
// block of queries.
//
// Tiling: 48 queries of a head at a time, against all keys of the prefix that any of them sees. Scores are outer.h's
// product of queries (broadcast, read in place) and of the keys' transpose (in vectors), which is made once for a call;
// where the prefix is dropped out, which each row of the batch is by itself, once for each task.
#pragma once
#include <algorithm>
#include <cmath>

#include "../parallel.h"
#include "dropout.h"
#include "heads.h"
#include "outer.h"
#include "workspace.h"

namespace fusetune::FUSETUNE_ISA {

// One head's [P, D] matrices and their transposes [D, P], padded with zeros; keys are multiplied by the scale.
struct PackedPrefix {
  float *key, *value, *key_t, *value_t;
};
static inline int64_t packed_floats(const Prefix& p) {
  return 2 * (p.count * padded(p.dim) + p.dim * padded(p.count));
}
static inline PackedPrefix packed_at(const Prefix& p, float* memory) {
  const int64_t rows = p.count * padded(p.dim);
  return {memory, memory + rows, memory + 2 * rows, memory + 2 * rows + p.dim * padded(p.count)};
}

// Applies the dropout of batch row b to row j of a head, whose index counts from `first`: 0 for keys, the number of
// all keys' elements for values.
static inline void drop_prefix_row(const Prefix& p, int64_t first, int64_t b, int64_t h, int64_t j, float* row) {
  apply_dropout(p.dropout, first + ((b * p.count + j) * p.kv_heads + h) * p.dim, p.dim, row);
}
static inline int64_t first_value(const Prefix& p) { return p.batch * p.count * p.kv_heads * p.dim; }

// A head of a prefix as fp32 [P, padded(D)], with zeros up to whole vectors.
static inline void pack_head(const Prefix& p, const Heads& from, int64_t first, int64_t g, int64_t b, int64_t h,
                             float factor, float* to) {
  pack_rows(rows_of(from, g, h, 0), p.count, p.dim, factor, to);
  if (!p.dropout.threshold) return;
  for (int64_t j = 0; j < p.count; ++j) drop_prefix_row(p, first, b, h, j, to + j * padded(p.dim));
}

// Head h of prefix g, dropped out for batch row b. Only the backward pass needs the values' transpose.
static inline void pack(const Prefix& p, int64_t g, int64_t b, int64_t h, bool backward, const PackedPrefix& to) {
  pack_head(p, p.key, 0, g, b, h, p.scale, to.key);
  pack_head(p, p.value, first_value(p), g, b, h, 1, to.value);
  const int64_t ld = padded(p.dim);
  transpose_rows({to.key, ld}, p.count, p.dim, 1, to.key_t, padded(p.count));
  if (backward) transpose_rows({to.value, ld}, p.count, p.dim, 1, to.value_t, padded(p.count));
}

// All prefixes and heads, into `memory`; nothing where they are dropped out.
static inline void pack_all(const Prefix& p, bool backward, float* memory) {
  if (p.dropout.threshold) return;
  const auto pack_one = [&](int64_t i) {
    pack(p, i / p.kv_heads, 0, i % p.kv_heads, backward, packed_at(p, memory + i * packed_floats(p)));
  };
  const int64_t all = p.groups * p.kv_heads;
  if (all * p.count * p.dim > 1 << 15) return parallel_chunks(all, pack_one);
  for (int64_t i = 0; i < all; ++i) pack_one(i);  // sooner done than other threads are awake
}

static inline int64_t prefix_of(const Prefix& p, int64_t b) { return p.rows ? p.rows[b] : 0; }
static inline int64_t length_of(const Prefix& p, int64_t g) { return g < 0 ? 0 : p.lengths ? p.lengths[g] : p.count; }

// A block of queries of one head, and what they see: keys from `begin`, a multiple of kLanes, to `end`.
struct Block {
  int64_t b, head, first, queries;
  int64_t begin, end;
  int64_t keys() const { return end - begin; }
  int64_t width() const { return whole_vectors(keys()); }
  void* address(const Heads& x) const { return address_of(x, b, head, first); }
  Matrix rows(const Heads& x) const { return rows_of(x, b, head, first); }
};

// The first key that query i sees.
static inline int64_t first_seen(const Prefix& p, int64_t length, int64_t i) {
  return p.window > 0 ? std::max<int64_t>(0, length + p.position + i - p.window + 1) : 0;
}

static inline Block block_of(const Prefix& p, int64_t b, int64_t head, int64_t first, int64_t queries) {
  const int64_t length = length_of(p, prefix_of(p, b));
  return {b, head, first, queries, std::min(length, first_seen(p, length, first)) / kLanes * kLanes, length};
}

// The rows of the block after this one, to be asked for meanwhile.
static inline Region rows_after(const Prefix& p, const Block& block, const Heads& x) {
  if (!x.data) return {};
  const int64_t size = x.dtype == Dtype::f32 ? 4 : 2, next = block.first + block.queries;
  const auto* row = static_cast<const char*>(address_of(x, block.b, block.head, next));
  const int64_t count = std::max<int64_t>(0, std::min(kQueries, p.tokens - next));
  return {row, x.token * size, count, (p.dim * size + 63) / 64};
}

// scores [queries, padded(P)] = scale q . k (+ bias) of the block's keys; -inf for those that a query does not see, and
// up to the block's width.
static inline void block_scores(const Prefix& p, const PackedPrefix& packed, const Block& block, const Floats2d& q,
                                float* scores, Ahead& ahead) {
  const int64_t ld = padded(p.count), keys = block.keys(), width = block.width();
  outer({q.data, q.stride, 1}, block.queries, {packed.key_t + block.begin, ld}, width, p.dim,
        {scores, ld, nullptr, 0, nullptr}, ahead);
  for (int64_t r = 0; r < block.queries; ++r, scores += ld) {
    if (p.bias) {
      const float* bias = p.bias + block.b * p.bias_batch + block.head * p.bias_head +
                          (block.first + r) * p.bias_token + block.begin;
      for (int64_t j = 0; j < keys; ++j) scores[j] += bias[j];
    }
    const int64_t unseen = std::min(first_seen(p, block.end, block.first + r) - block.begin, keys);
    for (int64_t j = 0; j < unseen; ++j) scores[j] = -INFINITY;
    for (int64_t j = keys; j < width; ++j) scores[j] = -INFINITY;
  }
}

}  // namespace fusetune::FUSETUNE_ISA
