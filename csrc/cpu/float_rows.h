// Rows of a matrix in fp32, whatever they are stored in: in place, or converted into a buffer.
#pragma once
#include "isa/isa.h"
#include "isa_kernels.h"

namespace fusetune::FUSETUNE_ISA {

static inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// Calls f with a null pointer of the element type.
template <class Function>
static void with_type(Dtype dtype, const Function& f) {
  if (dtype == Dtype::f32) return f(static_cast<float*>(nullptr));
  if (dtype == Dtype::f16) return f(static_cast<f16*>(nullptr));
  f(static_cast<bf16*>(nullptr));
}

// Rows in fp32, at `stride` from each other.
struct Floats2d {
  float* data;
  int64_t stride;
  float* row(int64_t r) const { return data + r * stride; }
};

// `rows` rows of a matrix in fp32: in place, or converted into `buffer`. whole: to be read in whole vectors, with zeros
// after the n elements.
static inline Floats2d read_rows(const Matrix& m, int64_t first, int64_t rows, int64_t n, float* buffer,
                                 bool whole = false) {
  if (m.dtype == Dtype::f32 && !(whole && n % kLanes)) {
    return {const_cast<float*>(static_cast<const float*>(m.data)) + first * m.ld, m.ld};
  }
  const Floats2d out{buffer, padded(n)};
  with_type(m.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t r = 0; r < rows; ++r) {
      const T* x = static_cast<const T*>(m.data) + (first + r) * m.ld;
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) store(out.row(r) + i, load(x + i));
      if (i < n) store(out.row(r) + i, load_part(x + i, static_cast<int>(n - i)));
    }
  });
  return out;
}

// Where to write rows in fp32: in place, or to `buffer`, from which write_rows then converts them.
static inline Floats2d rows_to_write(const MutMatrix& m, int64_t first, int64_t n, float* buffer) {
  if (m.dtype != Dtype::f32) return {buffer, padded(n)};
  return {static_cast<float*>(m.data) + first * m.ld, m.ld};
}

static inline void write_rows(const MutMatrix& m, int64_t first, int64_t rows, int64_t n, const Floats2d& from) {
  if (m.dtype == Dtype::f32) return;
  with_type(m.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t r = 0; r < rows; ++r) {
      T* y = static_cast<T*>(m.data) + (first + r) * m.ld;
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) store(y + i, load(from.row(r) + i));
      if (i < n) store_part(y + i, load(from.row(r) + i), static_cast<int>(n - i));
    }
  });
}

}  // namespace fusetune::FUSETUNE_ISA
