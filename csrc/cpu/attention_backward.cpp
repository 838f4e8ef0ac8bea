// Softmax attention, with dropout of its weights and to a prefix besides, backward: from the result and its log-sum-exp.
//
// Tiling: attention.h's; a task is the heads of the query that share a head of keys and values of one batch row, and
// the gradients of those stay in L2 while it goes through the queries. So no sum depends on the number of threads. Where
// a prefix needs its gradient, a task is up to a sixteenth of the batch's rows and one part of that gradient, which stays
// in L2 too; the parts are added in their order.
//
// With p = exp(scores - lse), the mask and factor m of the dropout and g = m (dout . v):
//   dv = (m p)^T dout,  ds = p (g - dout . out),  dq = scale ds k,  dk = scale ds^T q.
//
// Bytes: queries, results and their gradients are read and the gradients of the queries written once, 4 s B Hq T D with
// s bytes an element; keys and values are read and their gradients written once, 4 s B Hkv S D. Weights and masks are
// made again. Arithmetic: 10 B Hq T S D flops, and B Hq T S exps and random words.
#include <utility>

#include "attention.h"
#include "exp.h"
#include "prefix_sums.h"

namespace fusetune::FUSETUNE_ISA {

namespace {

class Backward {
 public:
  Backward(const Attention& a, const AttentionGradients& given)
      : a_(a), given_(given), dim_(padded(a.dim)), keys_(padded(a.keys)), begin_(prefix_width(a)), ld_(scores_ld(a)) {}

  // Of a row, in floats: two transposes, rows of keys and values with their gradients, and a block's buffer.
  int64_t row_floats() const {
    const int64_t rows = a_.prefix.count + keys_;
    return 2 * a_.dim * ld_ + 2 * rows * dim_ + 2 * keys_ * dim_ + kQueries * (3 * dim_ + 2 * ld_) + ld_;
  }

  // Head h of keys of batch row b. dprefix: the sum to which the prefix's gradient is added; null where not needed.
  void row(int64_t b, int64_t h, const PrefixGradient& dprefix, float* memory) {
    const int64_t rows = a_.prefix.count + keys_;
    dprefix_ = dprefix;
    const auto take = [&](int64_t count) { return std::exchange(memory, memory + count); };
    key_t_ = take(a_.dim * ld_), value_t_ = take(a_.dim * ld_);
    key_ = key_rows(a_, a_.prefix.key, a_.key, b, h, take(rows * dim_));
    const KeyRows value = key_rows(a_, a_.prefix.value, a_.value, b, h, take(rows * dim_));
    dkey_ = take(keys_ * dim_), dvalue_ = take(keys_ * dim_);
    transpose_keys(a_, key_, b, a_.scale, key_t_);
    transpose_keys(a_, value, b, 1, value_t_);
    std::fill_n(dkey_, 2 * keys_ * dim_, 0.f);
    const int64_t group = a_.heads / a_.kv_heads;
    for (int64_t head = h * group; head < (h + 1) * group; ++head) {
      for (int64_t first = 0; first < a_.tokens; first += kQueries) block(Block(a_, b, head, first), memory);
    }
    write(given_.dkey, b, h, 0, a_.keys, dkey_, a_.scale);
    write(given_.dvalue, b, h, 0, a_.keys, dvalue_, 1);
  }

 private:
  void block(const Block& block, float* buffer) const {
    float *sums = buffer + 2 * kQueries * dim_, *p = sums + kQueries * dim_, *ds = p + kQueries * ld_;
    const int64_t whole = whole_vectors(a_.dim), joined = prefix_keys(a_, block.b);
    const Floats2d q = read_rows(block.rows(a_.query), 0, block.queries, a_.dim, buffer, true);
    const Floats2d upper =
        read_rows(block.rows(given_.dout), 0, block.queries, a_.dim, buffer + kQueries * dim_, true);
    Ahead nothing;
    block_scores(a_, key_t_, block, q, p);
    outer({upper.data, upper.stride, 1}, block.queries, {value_t_, ld_}, block.width(a_), a_.dim,
          {ds, ld_, nullptr, 0, nullptr}, nothing);
    softmax_backward(block, upper, p, ds, ds + kQueries * ld_);
    if (given_.dquery.data) {
      if (joined) {
        outer({ds, ld_, 1}, block.queries, {key_.prefix.data, key_.prefix.stride}, whole, joined,
              {sums, dim_, nullptr, 0, nullptr}, nothing);
      }
      outer({ds + begin_, ld_, 1}, block.queries, {key_.tokens.data, key_.tokens.stride}, whole, block.keys,
            {sums, dim_, joined ? sums : nullptr, dim_, nullptr}, nothing);
      write(given_.dquery, block.b, block.head, block.first, block.queries, sums, a_.scale);
    }
    const auto add_products_to = [&](float* to, const float* weights, int64_t keys, const Floats2d& rows) {
      outer({weights, 1, ld_}, keys, {rows.data, rows.stride}, whole, block.queries, {to, dim_, to, dim_, nullptr},
            nothing);
    };
    if (given_.dkey.data) add_products_to(dkey_, ds + begin_, block.keys, q);
    if (given_.dvalue.data) add_products_to(dvalue_, p + begin_, block.keys, upper);
    if (!joined || !dprefix_.key) return;
    add_products_to(dprefix_.key, ds, joined, q);
    add_products_to(dprefix_.value, p, joined, upper);
  }

  // Scores become dropped weights; ds, dout . v so far, the gradients of the scores. kept: of one row.
  void softmax_backward(const Block& block, const Floats2d& upper, float* p, float* ds, float* kept) const {
    const int64_t row = block.row(a_), width = block.width(a_);
    with_type(given_.out.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* out = static_cast<const T*>(address_of(given_.out, block.b, block.head, block.first));
      for (int64_t r = 0; r < block.queries; ++r, out += given_.out.token, p += ld_, ds += ld_) {
        std::fill_n(kept, width, 1.f);
        apply_dropout(a_.dropout, (row + r) * a_.keys, block.seen(a_, r), kept + begin_);
        const F delta = set1(dot(upper.row(r), out, a_.dim)), top = set1(given_.lse[row + r]);
        for (int64_t j = 0; j < width; j += kLanes) {
          const F weight = exp_nonpositive(sub(load(p + j), top)), factor = load(kept + j);
          store(ds + j, mul(weight, sub(mul(factor, load(ds + j)), delta)));
          store(p + j, mul(weight, factor));
        }
      }
    });
  }

  // Rows of a gradient, times the factor.
  void write(const Heads& to, int64_t b, int64_t head, int64_t first, int64_t count, const float* rows,
             float factor) const {
    if (!to.data) return;
    with_type(to.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      T* row = static_cast<T*>(address_of(to, b, head, first));
      for (int64_t r = 0; r < count; ++r, row += to.token) store_scaled_row(rows + r * dim_, factor, a_.dim, row);
    });
  }

  const Attention& a_;
  const AttentionGradients& given_;
  const int64_t dim_, keys_, begin_, ld_;
  float *key_t_ = nullptr, *value_t_ = nullptr, *dkey_ = nullptr, *dvalue_ = nullptr;
  KeyRows key_{};
  PrefixGradient dprefix_{};
};

}  // namespace

void attention_backward(const Attention& a, const AttentionGradients& given) {
  constexpr int64_t kParts = 16;
  const bool of_prefix = a.prefix.count && given.dprefix_key;
  // Neighbours may have different prefixes.
  const int64_t rows = of_prefix && !a.prefix.rows ? (a.batch + kParts - 1) / kParts : 1;
  const int64_t parts = (a.batch + rows - 1) / rows, size = prefix_gradient_floats(a.prefix.count, a.dim);
  float* const gradients = of_prefix ? workspace<Purpose::shared>(parts * a.kv_heads * size) : nullptr;
  parallel_chunks(parts * a.kv_heads, [&](int64_t task) {
    const int64_t part = task / a.kv_heads, h = task % a.kv_heads;
    PrefixGradient dprefix{};
    if (of_prefix) {
      dprefix = prefix_gradient_at(a.prefix.count, a.dim, gradients + task * size);
      std::fill_n(dprefix.key, size, 0.f);
    }
    Backward backward(a, given);
    float* const memory = workspace(backward.row_floats());
    for (int64_t b = part * rows; b < std::min(a.batch, (part + 1) * rows); ++b) backward.row(b, h, dprefix, memory);
  });
  if (!given.dprefix_key) return;
  sum_prefix_parts({a.prefix.groups, a.prefix.count, a.kv_heads, a.dim}, parts,
                   [&](int64_t part) { return prefix_of(a, part * rows); }, gradients, a.scale, given.dprefix_key,
                   given.dprefix_value);
}

}  // namespace fusetune::FUSETUNE_ISA
