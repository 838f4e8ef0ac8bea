// Runs of elements between their storage type and fp32.
#pragma once
#include "isa/isa.h"
#include "kernels.h"

namespace fusetune {
namespace FUSETUNE_ISA {

template <class T>
FUSETUNE_INLINE void load_floats_of(const void* data, int64_t offset, int64_t n, float* out) {
  const T* p = static_cast<const T*>(data) + offset;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(p + i));
  if (i < n) store(out + i, load_part(p + i, static_cast<int>(n - i)));
}

// n elements from `offset` as fp32, then zeros up to a multiple of kLanes.
FUSETUNE_INLINE void load_floats(const void* data, Dtype dtype, int64_t offset, int64_t n, float* out) {
  switch (dtype) {
    case Dtype::f32: return load_floats_of<float>(data, offset, n, out);
    case Dtype::f16: return load_floats_of<f16>(data, offset, n, out);
    case Dtype::bf16: return load_floats_of<bf16>(data, offset, n, out);
  }
}

template <class T>
FUSETUNE_INLINE void store_floats_of(const float* in, void* data, int64_t offset, int64_t n) {
  T* p = static_cast<T*>(data) + offset;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(p + i, load(in + i));
  if (i < n) store_part(p + i, load_part(in + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

// n fp32 values to elements from `offset`.
FUSETUNE_INLINE void store_floats(const float* in, void* data, Dtype dtype, int64_t offset, int64_t n) {
  switch (dtype) {
    case Dtype::f32: return store_floats_of<float>(in, data, offset, n);
    case Dtype::f16: return store_floats_of<f16>(in, data, offset, n);
    case Dtype::bf16: return store_floats_of<bf16>(in, data, offset, n);
  }
}

}  // namespace FUSETUNE_ISA
}  // namespace fusetune
