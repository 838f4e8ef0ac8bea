// Rotary position embedding of the heads of x: out = x * cos + (-x2, x1) * sin, with x1 and x2 the halves of a head; or
// the transpose of that, which is its backward pass.
//
// Tiling: tokens in chunks of about 16 Ki elements; a token's cos and sin stay in L1 for all of its heads. Bytes: x read
// and out written once, 2 s B H T D with s bytes an element; PyTorch, by the operator, some 14 s B H T D each way. Every
// product and the sum are rounded by themselves, as PyTorch rounds them: in fp32 the results are the same.
#include <algorithm>

#include "elementwise.h"
#include "heads.h"
#include "isa_kernels.h"

namespace fusetune::FUSETUNE_ISA {

namespace {

// A head: out1 = x1 cos1 -+ x2 sin_1, out2 = x2 cos2 +- x1 sin_2; transposed, the other half's sin counts.
template <class T, class C>
void rotate(const T* x, const C* cos, const C* sin, int64_t half, bool transposed, T* out) {
  for_vectors<1>(0, half, [&](int64_t i, int lanes) {
    const F first = read(x + i, lanes), second = read(x + half + i, lanes);
    const F sin1 = read(sin + i, lanes), sin2 = read(sin + half + i, lanes);
    const F kept1 = mul(first, read(cos + i, lanes)), kept2 = mul(second, read(cos + half + i, lanes));
    const F turned1 = mul(second, transposed ? sin2 : sin1), turned2 = mul(first, transposed ? sin1 : sin2);
    write(out + i, transposed ? add(kept1, turned1) : sub(kept1, turned1), lanes);
    write(out + half + i, transposed ? sub(kept2, turned2) : add(kept2, turned2), lanes);
  });
}

}  // namespace

void rotary(const Heads& x, const RotaryShape& shape, const Heads& cos, const Heads& sin, bool transposed,
            const Heads& out) {
  const auto& [batch, heads, tokens, dim] = shape;
  for_rows_of(batch * tokens, heads * dim, [&, heads = heads, tokens = tokens, dim = dim](int64_t row) {
    const int64_t b = row / tokens, t = row % tokens;
    with_type(x.dtype, [&](auto* type) {
      with_type(cos.dtype, [&](auto* table_type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using C = std::remove_pointer_t<decltype(table_type)>;
        const C* const c = static_cast<const C*>(address_of(cos, b, 0, t));
        const C* const s = static_cast<const C*>(address_of(sin, b, 0, t));
        for (int64_t h = 0; h < heads; ++h) {
          rotate(static_cast<const T*>(address_of(x, b, h, t)), c, s, dim / 2, transposed,
                 static_cast<T*>(address_of(out, b, h, t)));
        }
      });
    });
  });
}

}  // namespace fusetune::FUSETUNE_ISA
