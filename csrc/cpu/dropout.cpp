// out = dropout(x), both [M, K] and of one dtype: the forward pass, and with the same seed the backward pass.
//
// Tiling: rows in chunks of about 16 Ki elements, some of a row at a time in L1. Bytes: x is read and out written once;
// no mask is. The random words are the floor: see dropout.h.
#include "dropout.h"

#include "elementwise.h"
#include "isa_kernels.h"

namespace fusetune::FUSETUNE_ISA {

namespace {

constexpr int64_t kSpan = 1024;

template <class T>
void drop_row(const T* x, int64_t first, int64_t k, const Dropout& dropout, T* out) {
  alignas(64) float buffer[kSpan];
  for (int64_t d = 0; d < k; d += kSpan) {
    const int64_t n = std::min(kSpan, k - d);
    for_vectors<2>(0, n, [&](int64_t i, int lanes) { store(buffer + i, read(x + d + i, lanes)); });
    apply_dropout(dropout, first + d, n, buffer);
    for_vectors<2>(0, n, [&](int64_t i, int lanes) { write(out + d + i, load(buffer + i), lanes); });
  }
}

}  // namespace

void dropout(const Matrix& x, int64_t m, int64_t k, const Dropout& dropout, const MutMatrix& out) {
  const auto with = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows_of(m, k, [&](int64_t row) {
      drop_row(static_cast<const T*>(x.data) + row * x.ld, row * k, k, dropout, static_cast<T*>(out.data) + row * out.ld);
    });
  };
  if (x.dtype == Dtype::f32) return with(static_cast<float*>(nullptr));
  if (x.dtype == Dtype::f16) return with(static_cast<f16*>(nullptr));
  with(static_cast<bf16*>(nullptr));
}

}  // namespace fusetune::FUSETUNE_ISA
