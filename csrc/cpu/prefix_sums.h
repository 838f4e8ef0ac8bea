// The gradient of prefixes from parts, each a sum over some queries that one prefix was seen by: added in their order, so
// that the same numbers come out on any number of threads.
#pragma once
#include "../parallel.h"
#include "heads.h"

namespace fusetune::FUSETUNE_ISA {

// A head of a prefix: keys (before the scale), then values, [P, padded(D)] each.
struct PrefixGradient {
  float *key, *value;
};
static inline int64_t prefix_gradient_floats(int64_t count, int64_t dim) { return 2 * count * padded(dim); }
static inline PrefixGradient prefix_gradient_at(int64_t count, int64_t dim, float* memory) {
  return {memory, memory + count * padded(dim)};
}

// to [n] = from, added to what it holds where `plus`.
template <class T>
static void store_sum(const float* from, bool plus, int64_t n, T* to) {
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) store(to + d, plus ? add(load(to + d), load(from + d)) : load(from + d));
  if (d == n) return;
  const int lanes = static_cast<int>(n - d);
  const F old = plus ? load_part(to + d, lanes) : zero();
  store_part(to + d, add(old, load(from + d)), lanes);
}

// Shapes of prefixes [G, P, Hkv, D] and of their parts' gradients [parts][Hkv].
struct PrefixShape {
  int64_t groups, count, kv_heads, dim;
};
// prefix_of(part): which prefix it is of.
template <class PrefixOf>
static void sum_prefix_parts(const PrefixShape& shape, int64_t parts, const PrefixOf& prefix_of, float* gradients,
                             float scale, float* dkey, float* dvalue) {
  const auto& [groups, count, kv_heads, dim] = shape;
  const int64_t size = prefix_gradient_floats(count, dim);
  parallel_chunks(groups * kv_heads, [&, count = count, kv_heads = kv_heads, dim = dim](int64_t i) {
    const int64_t g = i / kv_heads, h = i % kv_heads;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t at = ((g * count + j) * kv_heads + h) * dim;
      float *const key = dkey + at, *const value = dvalue + at;
      for (int64_t d = 0; d < dim; ++d) key[d] = value[d] = 0;
      for (int64_t part = 0; part < parts; ++part) {
        if (prefix_of(part) != g) continue;
        const PrefixGradient from = prefix_gradient_at(count, dim, gradients + (part * kv_heads + h) * size);
        store_sum(from.key + j * padded(dim), true, dim, key);
        store_sum(from.value + j * padded(dim), true, dim, value);
      }
      for (int64_t d = 0; d < dim; ++d) key[d] *= scale;
    }
  });
}

}  // namespace fusetune::FUSETUNE_ISA
