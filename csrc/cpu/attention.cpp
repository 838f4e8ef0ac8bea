// Softmax attention, with dropout of its weights and to a prefix besides, forward.
//
// Tiling: attention.h's; a task is some blocks of queries of one head. A query's weights stay unnormalised, relative to
// the largest, until the result is divided by their sum; the mask falls on them in L1.
//
// Bytes: queries are read and results written once, 2 s B Hq T D with s bytes an element, and 4 B Hq T of log-sum-exps;
// keys and values are read once for each head's task. Neither weights nor masks go to memory, where PyTorch writes
// B Hq T S of them some eight times. Arithmetic: 4 B Hq T S D flops, and B Hq T S exps and random words. A prefix counts
// as keys; it is read once for each task.
#include <cfloat>

#include "attention.h"
#include "exp.h"

namespace fusetune::FUSETUNE_ISA {

namespace {

// Scores become weights relative to the largest; returns their log-sum-exp and, in `total`, their sum.
float take_softmax(float* row, int64_t width, float& total) {
  F largest = set1(-FLT_MAX);
  for (int64_t j = 0; j < width; j += kLanes) largest = max(largest, load(row + j));
  const float top = hmax(largest);
  F sum = zero();
  for (int64_t j = 0; j < width; j += kLanes) {
    const F weight = exp_nonpositive(sub(load(row + j), set1(top)));
    store(row + j, weight);
    sum = add(sum, weight);
  }
  total = hsum(sum);
  return total == 0 ? INFINITY : top + std::log(total);
}

void attend_block(const Attention& a, const float* key_t, const KeyRows& value, const Block& block, const Heads& out,
                  float* lse, float* buffer) {
  const int64_t ld = scores_ld(a), dim = padded(a.dim), whole = whole_vectors(a.dim), row = block.row(a);
  const int64_t begin = prefix_width(a), joined = prefix_keys(a, block.b);
  float* sums = buffer + kQueries * dim;
  float* scores = sums + kQueries * dim;
  const Floats2d q = read_rows(block.rows(a.query), 0, block.queries, a.dim, buffer);
  block_scores(a, key_t, block, q, scores);
  float totals[kQueries];
  for (int64_t r = 0; r < block.queries; ++r) {
    float* weights = scores + r * ld;
    lse[row + r] = take_softmax(weights, block.width(a), totals[r]);
    apply_dropout(a.dropout, (row + r) * a.keys, block.seen(a, r), weights + begin);
  }
  Ahead nothing;
  if (joined) {
    outer({scores, ld, 1}, block.queries, {value.prefix.data, value.prefix.stride}, whole, joined,
          {sums, dim, nullptr, 0, nullptr}, nothing);
  }
  outer({scores + begin, ld, 1}, block.queries, {value.tokens.data, value.tokens.stride}, whole, block.keys,
        {sums, dim, joined ? sums : nullptr, dim, nullptr}, nothing);
  with_type(out.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* to = static_cast<T*>(address_of(out, block.b, block.head, block.first));
    for (int64_t r = 0; r < block.queries; ++r, to += out.token) {
      store_scaled_row(sums + r * dim, totals[r] == 0 ? 0 : 1 / totals[r], a.dim, to);
    }
  });
}

}  // namespace

void attention(const Attention& a, const Heads& out, float* lse) {
  const int64_t each = task_queries(a.tokens, a.batch * a.heads), tasks_of_head = (a.tokens + each - 1) / each;
  const int64_t dim = padded(a.dim), keys = a.prefix.count + padded(a.keys), ld = scores_ld(a);
  parallel_chunks(a.batch * a.heads * tasks_of_head, [&](int64_t task) {
    const int64_t b = task / (a.heads * tasks_of_head), head = task / tasks_of_head % a.heads;
    const int64_t h = head / (a.heads / a.kv_heads), begin = task % tasks_of_head * each;
    float* key_t = workspace(a.dim * ld + keys * dim + kQueries * (2 * dim + ld));
    float* rows = key_t + a.dim * ld;
    float* buffer = rows + keys * dim;
    transpose_keys(a, key_rows(a, a.prefix.key, a.key, b, h, rows), b, a.scale, key_t);
    const KeyRows value = key_rows(a, a.prefix.value, a.value, b, h, rows);
    for (int64_t first = begin; first < std::min(a.tokens, begin + each); first += kQueries) {
      attend_block(a, key_t, value, Block(a, b, head, first), out, lse, buffer);
    }
  });
}

}  // namespace fusetune::FUSETUNE_ISA
