// Narrow products: c [count, vectors * lanes] = base + init + sum over depth of scalars(i, depth) * vectors(depth).
//
// Register tiles of `count` broadcast scalars x `vectors` vectors: count * vectors FMAs for count + vectors loads. With
// 32 registers 8 x 3 or 6 x 4, with 16 registers 4 x 3.
#pragma once
#include "isa/isa.h"

namespace fusetune::FUSETUNE_ISA {

constexpr int64_t kPanel = 3 * kLanes;  // columns of a packed operand's panels

// An operand that is read element by element, and one that is read in whole vectors.
struct Scalars {
  const float* data;
  int64_t stride, depth_stride;
};
struct Vectors {
  const float* data;
  int64_t depth_stride;
};

// acc [count][vectors] += sum over depth of scalars(i, depth) * vectors(depth); calls before() at every step.
template <int count, int vectors, class Function>
FUSETUNE_INLINE void add_products(const Scalars& a, const Vectors& b, int64_t depth, F (&acc)[count][vectors],
                                  const Function& before) {
  const float* scalars = a.data;
  const float* row = b.data;
#pragma GCC unroll 2
  for (int64_t d = 0; d < depth; ++d, scalars += a.depth_stride, row += b.depth_stride) {
    before();
    F bv[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) bv[v] = load(row + v * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < count; ++i) {
      const F av = set1(scalars[i * a.stride]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) acc[i][v] = fma(av, bv[v], acc[i][v]);
    }
  }
}

// Memory that is going to be needed: up to two rectangles of `lines` cache lines a row, asked for one line at a time
// while something else is multiplied, which leaves the load ports idle and the memory too.
struct Region {
  const char* row;
  int64_t ld;  // bytes
  int64_t rows, lines;
};
class Ahead {
 public:
  Ahead() = default;
  explicit Ahead(const Region& first, const Region& second = {}) : now_(first), next_(second), at_(first.row) {}
  FUSETUNE_INLINE_METHOD void step() {
    if (now_.rows <= 0) return;
    __builtin_prefetch(at_, 0, 2);  // into L2: it is for later
    at_ += 64;
    if (++line_ < now_.lines) return;
    line_ = 0;
    at_ = now_.row += now_.ld;
    if (--now_.rows > 0) return;
    now_ = next_;
    next_.rows = 0;
    at_ = now_.row;
  }

 private:
  Region now_{}, next_{};
  const char* at_ = nullptr;
  int64_t line_ = 0;
};

struct Target {
  float* data;
  int64_t ld;
  const float* base;  // added where not null
  int64_t base_ld;
  const float* init;  // a row added to all rows, where not null
};

#if defined(FUSETUNE_ISA_AVX2)
constexpr int kMaxOuterVectors = 3;
constexpr int outer_rows(int vectors) { return vectors == 1 ? 8 : vectors == 2 ? 6 : 4; }
#else
constexpr int kMaxOuterVectors = 4;
constexpr int outer_rows(int vectors) { return vectors == 1 ? 12 : vectors == 2 ? 12 : vectors == 3 ? 8 : 6; }
#endif
constexpr int64_t kOuterRows = 24;  // a multiple of all tiles' rows

// Not inlined: among other code the compiler would spill accumulators.
template <int count, int vectors>
__attribute__((noinline)) static void outer_tile(const Scalars& a, const Vectors& b, int64_t depth, const Target target,
                                                 Ahead& shared_ahead) {
  F acc[count][vectors];
  float* to = target.data;
#pragma GCC unroll 12
  for (int i = 0; i < count; ++i, to += target.ld) {
    __builtin_prefetch(to, 1);
    if constexpr (vectors > 1) __builtin_prefetch(to + (vectors - 1) * kLanes, 1);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) acc[i][v] = target.init ? load(target.init + v * kLanes) : zero();
  }
  Ahead ahead = shared_ahead;
  add_products(a, b, depth, acc, [&]() __attribute__((always_inline)) { ahead.step(); });
  shared_ahead = ahead;
  if (target.base) {
    const float* from = target.base;
#pragma GCC unroll 12
    for (int i = 0; i < count; ++i, from += target.base_ld) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) acc[i][v] = add(load(from + v * kLanes), acc[i][v]);
    }
  }
  to = target.data;
#pragma GCC unroll 12
  for (int i = 0; i < count; ++i, to += target.ld) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store(to + v * kLanes, acc[i][v]);
  }
}

template <int vectors>
static void outer_strip(Scalars a, int64_t count, const Vectors& b, int64_t depth, Target c,
                        Ahead& ahead) {
  constexpr int step = outer_rows(vectors), half = step / 2;
  const auto forward = [&](int64_t rows) {
    a.data += rows * a.stride;
    c.data += rows * c.ld;
    if (c.base) c.base += rows * c.base_ld;
    count -= rows;
  };
  for (; count >= step; forward(step)) outer_tile<step, vectors>(a, b, depth, c, ahead);
  for (; count >= half; forward(half)) outer_tile<half, vectors>(a, b, depth, c, ahead);
  for (; count > 0; forward(1)) outer_tile<1, vectors>(a, b, depth, c, ahead);
}

// The product over `width` columns, a multiple of kLanes.
static inline void outer(const Scalars& a, int64_t count, Vectors b, int64_t width, int64_t depth, Target c,
                         Ahead& ahead) {
  for (int64_t left = width / kLanes; left > 0;) {
    // As many vectors as a tile takes, but no strip of one vector after a full one.
    const int64_t take = left <= kMaxOuterVectors ? left : left == 4 ? 2 : left % 4 == 0 ? kMaxOuterVectors : 3;
    if (take == 1) outer_strip<1>(a, count, b, depth, c, ahead);
    if (take == 2) outer_strip<2>(a, count, b, depth, c, ahead);
    if (take == 3) outer_strip<3>(a, count, b, depth, c, ahead);
    if constexpr (kMaxOuterVectors == 4) {
      if (take == 4) outer_strip<4>(a, count, b, depth, c, ahead);
    }
    const int64_t columns = take * kLanes;
    b.data += columns;
    c.data += columns;
    if (c.base) c.base += columns;
    if (c.init) c.init += columns;
    left -= take;
  }
}

}  // namespace fusetune::FUSETUNE_ISA
