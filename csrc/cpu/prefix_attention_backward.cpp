// Attention to a prefix, backward: the gradients of the query and of the prefix, from the merged result and its
// log-sum-exp.
//
// Tiling: prefix_attention.h's; a task is a few heads of the query that share a head of the prefix, and their part of
// the prefix's gradient stays in L1 and L2 while they are gone through. The parts are cut without regard to the number
// of threads, at most 16 for each head and one more for each change of the prefix along the batch, and added in their
// order: the same numbers come out on any number of threads.
//
// Bytes: query, result and its gradient are read once, the query's gradient is read and written, 5 s B Hq T D with s
// bytes an element; at most 16 + B parts of 8 P Hkv D. Arithmetic: 10 B Hq T P D flops, 2 P / s for each byte.
#include "exp.h"
#include "prefix_attention.h"
#include "prefix_sums.h"

namespace fusetune::FUSETUNE_ISA {

namespace {

constexpr int64_t kParts = 16;

// `units` pairs (batch row, head of the group) from the first on, all with the same prefix.
struct Part {
  int64_t prefix, first, units;
};

// Calls f(part) for all parts.
template <class Function>
void for_parts(const Prefix& p, const Function& f) {
  const int64_t each = p.heads / p.kv_heads, most = (p.batch * each + kParts - 1) / kParts;
  Part part{0, 0, 0};
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t r = 0; r < each; ++r) {
      if (part.units == most || (part.units && prefix_of(p, b) != part.prefix)) {
        f(part);
        part.units = 0;
      }
      if (!part.units) part = {prefix_of(p, b), b * each + r, 0};
      ++part.units;
    }
  }
  if (part.units) f(part);
}

class Backward {
 public:
  Backward(const Prefix& p, const PrefixGradients& given) : p_(p), given_(given) {}

  int64_t buffer_floats() const { return kQueries * (3 * padded(p_.dim) + 2 * padded(p_.count)); }

  void block(const PackedPrefix& packed, const Block& block, const PrefixGradient& gradient, float* buffer) const {
    const int64_t ld = padded(p_.count), dim = padded(p_.dim), whole = whole_vectors(p_.dim);
    float* p = buffer + 3 * kQueries * dim;
    float* ds = p + kQueries * ld;
    const Floats2d q = read_rows(block.rows(p_.query), 0, block.queries, p_.dim, buffer, true);
    const Floats2d upper =
        read_rows(block.rows(given_.dout), 0, block.queries, p_.dim, buffer + kQueries * dim, true);
    Ahead first(rows_after(p_, block, p_.query), rows_after(p_, block, given_.dout));
    Ahead second(rows_after(p_, block, given_.out), rows_after(p_, block, given_.dquery));
    block_scores(p_, packed, block, q, p, first);
    outer({upper.data, upper.stride, 1}, block.queries, {packed.value_t + block.begin, ld}, block.width(), p_.dim,
          {ds, ld, nullptr, 0, nullptr}, second);
    softmax_backward(block, upper, p, ds);
    if (given_.dquery.data) {
      float* sums = buffer + 2 * kQueries * dim;
      outer({ds, ld, 1}, block.queries, {packed.key + block.begin * dim, dim}, whole, block.keys(),
            {sums, dim, nullptr, 0, nullptr}, first);
      store_dquery(block, sums);
    }
    if (!given_.dkey) return;
    const auto add_products_to = [&](const float* weights, const Floats2d& rows, float* to) {
      to += block.begin * dim;
      outer({weights, 1, ld}, block.keys(), {rows.data, rows.stride}, whole, block.queries, {to, dim, to, dim, nullptr},
            second);
    };
    add_products_to(ds, q, gradient.key);
    add_products_to(p, upper, gradient.value);
  }

 private:
  // Scores become probabilities; ds, dout . v so far, the gradients of the scores.
  void softmax_backward(const Block& block, const Floats2d& upper, float* p, float* ds) const {
    const float* lse = given_.lse + (block.b * p_.heads + block.head) * p_.tokens + block.first;
    with_type(given_.out.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* row = static_cast<const T*>(block.address(given_.out));
      for (int64_t r = 0; r < block.queries; ++r, row += given_.out.token, p += padded(p_.count), ds += padded(p_.count)) {
        const F delta = set1(dot(upper.row(r), row, p_.dim)), top = set1(lse[r]);
        for (int64_t j = 0; j < block.width(); j += kLanes) {
          const F weight = exp_nonpositive(sub(load(p + j), top));
          store(p + j, weight);
          store(ds + j, mul(weight, sub(load(ds + j), delta)));
        }
      }
    });
  }

  void store_dquery(const Block& block, const float* sums) const {
    with_type(given_.dquery.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      T* row = static_cast<T*>(block.address(given_.dquery));
      for (int64_t r = 0; r < block.queries; ++r) {
        store_sum(sums + r * padded(p_.dim), given_.add, p_.dim, row + r * given_.dquery.token);
      }
    });
  }

  const Prefix& p_;
  const PrefixGradients& given_;
};

// Adds the gradient of a head as batch row b saw it, dropped out, to that of the head.
void add_dropped(const Prefix& p, int64_t b, int64_t h, const PrefixGradient& from, const PrefixGradient& to) {
  const int64_t dim = padded(p.dim);
  for (int64_t j = 0; j < p.count; ++j) {
    drop_prefix_row(p, 0, b, h, j, from.key + j * dim);
    drop_prefix_row(p, first_value(p), b, h, j, from.value + j * dim);
    store_sum(from.key + j * dim, true, p.dim, to.key + j * dim);
    store_sum(from.value + j * dim, true, p.dim, to.value + j * dim);
  }
}

}  // namespace

void prefix_attend_backward(const Prefix& p, const PrefixGradients& given) {
  const int64_t each = packed_floats(p), size = prefix_gradient_floats(p.count, p.dim), group = p.heads / p.kv_heads;
  const bool own = p.dropout.threshold != 0;
  int64_t count = 0;
  for_parts(p, [&](const Part&) { ++count; });
  const int64_t packed_size = own ? 0 : p.groups * p.kv_heads * each;
  const int64_t part_floats = (count * sizeof(Part) / sizeof(float) + 15) / 16 * 16;
  float* const packs = workspace<Purpose::shared>(packed_size + part_floats + count * p.kv_heads * size);
  Part* const parts = reinterpret_cast<Part*>(packs + packed_size);
  float* const gradients = packs + packed_size + part_floats;
  count = 0;
  for_parts(p, [&](const Part& part) { parts[count++] = part; });
  pack_all(p, true, packs);
  const Backward backward(p, given);
  parallel_chunks(count * p.kv_heads, [&](int64_t task) {
    const int64_t h = task % p.kv_heads;
    const Part part = parts[task / p.kv_heads];
    const PrefixGradient total = prefix_gradient_at(p.count, p.dim, gradients + task * size);
    memset(total.key, 0, size * sizeof(float));
    float* memory = workspace((own ? each + size : 0) + backward.buffer_floats());
    float* buffer = memory + (own ? each + size : 0);
    const int64_t g = std::max<int64_t>(part.prefix, 0);
    const PackedPrefix packed = packed_at(p, own ? memory : packs + (g * p.kv_heads + h) * each);
    const PrefixGradient gradient = own ? prefix_gradient_at(p.count, p.dim, memory + each) : total;
    for (int64_t unit = part.first; unit < part.first + part.units; ++unit) {
      const int64_t b = unit / group;
      if (own && (unit == part.first || unit % group == 0)) {
        pack(p, g, b, h, true, packed);
        memset(gradient.key, 0, size * sizeof(float));
      }
      for (int64_t first = 0; first < p.tokens; first += kQueries) {
        const int64_t queries = std::min(kQueries, p.tokens - first);
        backward.block(packed, block_of(p, b, h * group + unit % group, first, queries), gradient, buffer);
      }
      const bool last = unit + 1 == part.first + part.units || (unit + 1) % group == 0;
      if (own && last) add_dropped(p, b, h, gradient, total);
    }
  });
  if (!given.dkey) return;
  sum_prefix_parts({p.groups, p.count, p.kv_heads, p.dim}, count, [&](int64_t part) { return parts[part].prefix; },
                   gradients, p.scale, given.dkey, given.dvalue);
}

}  // namespace fusetune::FUSETUNE_ISA
