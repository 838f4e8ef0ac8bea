// What the parts of fusetune._C share: how arguments travel, and the kernel that is asked for.
//
// Conventions (0 is a null pointer):
//   Matrix  (address, row stride in elements, dtype) with dtype 0 float32, 1 float16, 2 bfloat16
//   Heads   (address, distances of batch rows, heads and tokens in elements, dtype)
//   Dropout (seed, threshold, scale) or None
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/kernels.h"

namespace fusetune {

using Address = uintptr_t;
using MatrixArg = std::tuple<Address, int64_t, int>;
using HeadsArg = std::tuple<Address, int64_t, int64_t, int64_t, int>;
using DistancesArg = std::tuple<Address, int64_t, int64_t, int64_t>;
using DropoutArg = std::optional<std::tuple<uint64_t, uint32_t, float>>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Dtype dtype(int code) {
  if (code < 0 || code > 2) throw std::invalid_argument("dtype code must be 0, 1 or 2, got " + std::to_string(code));
  return static_cast<Dtype>(code);
}

inline Matrix matrix(const MatrixArg& m) {
  return {pointer<void>(std::get<0>(m)), std::get<1>(m), dtype(std::get<2>(m))};
}

inline MutMatrix mut_matrix(const MatrixArg& m) {
  return {pointer<void>(std::get<0>(m)), std::get<1>(m), dtype(std::get<2>(m))};
}

inline Heads heads(const HeadsArg& arg) {
  const auto& [address, batch, head, token, code] = arg;
  return {pointer<void>(address), batch, head, token, dtype(code)};
}

inline Dropout dropout_of(const DropoutArg& arg) {
  if (!arg) return {0, 0, 1.0f};
  return {std::get<0>(*arg), std::get<1>(*arg), std::get<2>(*arg)};
}

// The kernel, or a clear error where this instruction set's table has none.
template <class F>
F built(F kernel, const char* name) {
  if (!kernel) throw std::runtime_error(std::string(name) + " is not built for " + kernels().isa);
  return kernel;
}

// Adds the kernels of bottleneck adapters and of AdapterFusion.
void bind_adapters(pybind11::module_& m);
// Adds the norm of transformers' models.
void bind_norm(pybind11::module_& m);
// Adds memory for results.
void bind_blocks(pybind11::module_& m);
// Adds those of layers under several LoRA adapters.
void bind_multi_lora(pybind11::module_& m);
// Adds those of AdaLoRA.
void bind_adalora(pybind11::module_& m);
// Adds attention with dropout.
void bind_attention(pybind11::module_& m);
// Adds those of attention to a prefix.
void bind_prefix(pybind11::module_& m);
// Adds the kernels of prompts.
void bind_prompts(pybind11::module_& m);

}  // namespace fusetune
