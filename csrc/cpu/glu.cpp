// y = f(gate) * up, all [M, N], and its gradients. f: silu, gelu or gelu_new.
//
// Tiling: rows in chunks of about 16 Ki elements, a few vectors at a time; nothing is kept between elements.
// Bytes for fp32: forward 8 M N read and 4 M N written, backward 12 M N read and 8 M N written, all once. PyTorch, by
// the operator: forward 12 and 8, backward 24 and 12, and f(gate) is kept between the two.
#include <type_traits>

#include "activation.h"
#include "elementwise.h"
#include "isa_kernels.h"

namespace fusetune::FUSETUNE_ISA {

namespace {

constexpr int kUnroll = 2;  // vectors at a time: hides the latency of exp's chain

template <Activation kind>
using Kind = std::integral_constant<Activation, kind>;

template <Activation kind, class T>
void forward_row(const T* gate, const T* up, int64_t n, T* y) {
  for_vectors<kUnroll>(0, n, [&](int64_t i, int lanes) {
    const F value = activate<kind>(read(gate + i, lanes)).value;
    write(y + i, mul(value, read(up + i, lanes)), lanes);
  });
}

template <Activation kind, class T>
void backward_row(const T* dy, const T* gate, const T* up, int64_t n, T* dgate, T* dup) {
  for_vectors<kUnroll>(0, n, [&](int64_t i, int lanes) {
    const ValueAndSlope f = activate<kind>(read(gate + i, lanes));
    const F upper = read(dy + i, lanes), other = read(up + i, lanes);
    if (dgate) write(dgate + i, mul(mul(upper, other), f.slope), lanes);
    if (dup) write(dup + i, mul(upper, f.value), lanes);
  });
}

template <class T>
const T* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<const T*>(matrix.data) + row * matrix.ld;
}

template <class T>
T* row_of(const MutMatrix& matrix, int64_t row) {
  return matrix.data ? static_cast<T*>(matrix.data) + row * matrix.ld : nullptr;
}

// Calls run(a null pointer of the element type, the activation as a type).
template <class Run>
void with_types(Dtype dtype, Activation kind, const Run& run) {
  const auto with_kind = [&](auto* type) {
    if (kind == Activation::gelu) return run(type, Kind<Activation::gelu>{});
    if (kind == Activation::gelu_new) return run(type, Kind<Activation::gelu_new>{});
    run(type, Kind<Activation::silu>{});
  };
  if (dtype == Dtype::f32) return with_kind(static_cast<float*>(nullptr));
  if (dtype == Dtype::f16) return with_kind(static_cast<f16*>(nullptr));
  with_kind(static_cast<bf16*>(nullptr));
}

}  // namespace

void glu(const Matrix& gate, const Matrix& up, int64_t m, int64_t n, Activation kind, const MutMatrix& y) {
  with_types(gate.dtype, kind, [&](auto* type, auto f) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows_of(m, n, [&](int64_t row) {
      forward_row<decltype(f)::value>(row_of<T>(gate, row), row_of<T>(up, row), n, row_of<T>(y, row));
    });
  });
}

void glu_backward(const Matrix& dy, const Matrix& gate, const Matrix& up, int64_t m, int64_t n, Activation kind,
                  const MutMatrix& dgate, const MutMatrix& dup) {
  with_types(gate.dtype, kind, [&](auto* type, auto f) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_rows_of(m, n, [&](int64_t row) {
      backward_row<decltype(f)::value>(row_of<T>(dy, row), row_of<T>(gate, row), row_of<T>(up, row), n,
                                       row_of<T>(dgate, row), row_of<T>(dup, row));
    });
  });
}

}  // namespace fusetune::FUSETUNE_ISA
