// Attention to a prefix, merged by log-sum-exp into attention to other keys, forward.
//
// Tiling: prefix_attention.h's; a task is some blocks of queries of one head. The softmax is taken over all keys of the
// prefix and the base's sum at once, and its denominator divides the result, not the weights.
//
// Bytes: the query and the base's result are read once and the merged result is written over it, 3 s B Hq T D with s
// bytes an element; 8 B Hq T of log-sum-exps; scores stay in L1. The prefix is read once for each head. Arithmetic:
// 4 B Hq T P D flops, 4 P / 3 s for each byte (P = 32, fp32: 11), so FMAs are the floor.
#include <cfloat>

#include "exp.h"
#include "prefix_attention.h"

namespace fusetune::FUSETUNE_ISA {

namespace {

// The softmax of a block: scores become weights relative to the largest, and each query's sum is known.
struct Softmax {
  alignas(64) float top[kQueries], base[kQueries];  // the largest score; the base's weight
  float total[kQueries];

  // base_lse: that of the block's first query, the next ones `step` further.
  void take(const Block& block, float* scores, int64_t ld, const float* base_lse, int64_t step) {
    const int64_t queries = block.queries, width = block.width();
    for (int64_t r = 0; r < queries; ++r) {
      const float* row = scores + r * ld;
      F largest = set1(-FLT_MAX);
      for (int64_t j = 0; j < width; j += kLanes) largest = max(largest, load(row + j));
      const float lse = base_lse[r * step];
      base[r] = std::isinf(lse) ? -INFINITY : lse;  // of either sign: the base attends to nothing
      top[r] = std::max(hmax(largest), base[r]);
      base[r] -= top[r];
    }
    for (int64_t r = 0; r < queries; r += kLanes) store(base + r, exp_nonpositive(load(base + r)));
    for (int64_t r = 0; r < queries; ++r) {
      float* row = scores + r * ld;
      F sum = zero();
      for (int64_t j = 0; j < width; j += kLanes) {
        const F weight = exp_nonpositive(sub(load(row + j), set1(top[r])));
        store(row + j, weight);
        sum = add(sum, weight);
      }
      total[r] = base[r] + hsum(sum);
    }
  }
};

// out = from + of_base out, where of_base is not 0.
template <class T>
void merge(const float* from, float factor, float of_base, int64_t n, T* out) {
  const F scale = set1(factor), share = set1(of_base);
  int64_t d = 0;
  if (of_base == 0) {  // whatever the base has there
    for (; d + kLanes <= n; d += kLanes) store(out + d, mul(load(from + d), scale));
    if (d < n) store_part(out + d, mul(load(from + d), scale), static_cast<int>(n - d));
    return;
  }
  for (; d + kLanes <= n; d += kLanes) store(out + d, fma(load(out + d), share, mul(load(from + d), scale)));
  if (d == n) return;
  const int lanes = static_cast<int>(n - d);
  store_part(out + d, fma(load_part(out + d, lanes), share, mul(load(from + d), scale)), lanes);
}

void attend_block(const Prefix& p, const PackedPrefix& packed, const Block& block, const Heads& out,
                  const BaseLse& base_lse, float* lse, float* buffer) {
  const int64_t ld = padded(p.count), dim = padded(p.dim);
  float* sums = buffer + kQueries * dim;
  float* scores = sums + kQueries * dim;
  const Floats2d q = read_rows(block.rows(p.query), 0, block.queries, p.dim, buffer);
  Ahead ahead(rows_after(p, block, p.query), rows_after(p, block, out));
  block_scores(p, packed, block, q, scores, ahead);
  Softmax softmax;
  const float* base =
      base_lse.data + block.b * base_lse.batch + block.head * base_lse.head + block.first * base_lse.token;
  softmax.take(block, scores, ld, base, base_lse.token);
  outer({scores, ld, 1}, block.queries, {packed.value + block.begin * dim, dim}, whole_vectors(p.dim), block.keys(),
        {sums, dim, nullptr, 0, nullptr}, ahead);
  float* lse_row = lse + (block.b * p.heads + block.head) * p.tokens + block.first;
  with_type(out.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* row = static_cast<T*>(block.address(out));
    for (int64_t r = 0; r < block.queries; ++r, row += out.token) {
      const float total = softmax.total[r];
      const float factor = total == 0 ? 0 : 1 / total;
      merge(sums + r * dim, factor, softmax.base[r] * factor, p.dim, row);
      lse_row[r] = total == 0 ? INFINITY : softmax.top[r] + std::log(total);
    }
  });
}

}  // namespace

void prefix_attend(const Prefix& p, const Heads& out, const BaseLse& base_lse, float* lse) {
  const int64_t each = packed_floats(p), queries = task_queries(p.tokens, p.batch * p.heads);
  const int64_t tasks_of_head = (p.tokens + queries - 1) / queries;
  float* const all = p.dropout.threshold ? nullptr : workspace<Purpose::shared>(p.groups * p.kv_heads * each);
  pack_all(p, false, all);
  parallel_chunks(p.batch * p.heads * tasks_of_head, [&](int64_t task) {
    const int64_t b = task / (p.heads * tasks_of_head), head = task / tasks_of_head % p.heads;
    const int64_t g = prefix_of(p, b), h = head / (p.heads / p.kv_heads);
    float* memory = workspace(each + kQueries * (2 * padded(p.dim) + padded(p.count)));
    const bool own = p.dropout.threshold != 0;
    const PackedPrefix packed = packed_at(p, own ? memory : all + (std::max<int64_t>(g, 0) * p.kv_heads + h) * each);
    if (own && g >= 0) pack(p, g, b, h, false, packed);
    const int64_t begin = task % tasks_of_head * queries, end = std::min(p.tokens, begin + queries);
    for (int64_t first = begin; first < end; first += kQueries) {
      const Block block = block_of(p, b, head, first, std::min(kQueries, end - first));
      attend_block(p, packed, block, out, base_lse, lse, memory + each);
    }
  });
}

}  // namespace fusetune::FUSETUNE_ISA
