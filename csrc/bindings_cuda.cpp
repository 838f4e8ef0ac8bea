// fusetune._cuda: the CUDA launchers for Python. Tensors travel as addresses, 0 for none; functions return a CUDA error
// code. Whoever calls (pylib/ops/_cuda.py) has checked shapes, dtypes, devices and alignment. Conventions:
//   Matrix   (address, row stride in elements, dtype) with dtype 0 float32, 1 float16, 2 bfloat16
//   W4       (packed, codebook, absmax, absmax_codes, nested_code, nested_absmax, nested_offset, nested_blocksize,
//             blocksize, n, k)
//   LowRank  (left, right, rank, scale) or None
//   Dropout  (seed, threshold, scale) or None
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "launchers.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;
using MatrixArg = std::tuple<Address, int64_t, int>;
using Weight4bitArg = std::tuple<Address, Address, Address, Address, Address, Address, Address, int64_t, int64_t,
                                 int64_t, int64_t>;
using LowRankArg = std::optional<std::tuple<Address, Address, int, float>>;
using DropoutArg = std::optional<std::tuple<Address, uint32_t, float>>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

FusetuneWeight4bit weight_4bit(const Weight4bitArg& arg) {
  const auto& [packed, codebook, absmax, codes, nested_code, nested_absmax, offset, nested_blocksize, blocksize, n, k] =
      arg;
  return {pointer<uint8_t>(packed),    pointer<float>(codebook),      pointer<float>(absmax),
          pointer<uint8_t>(codes),     pointer<float>(nested_code),   pointer<float>(nested_absmax),
          pointer<float>(offset),      blocksize,                     nested_blocksize,
          n,                           k};
}

FusetuneLowRank low_rank(const LowRankArg& arg) {
  if (!arg) return {nullptr, nullptr, 0, 0.0f};
  const auto& [left, right, rank, scale] = *arg;
  return {pointer<float>(left), pointer<float>(right), rank, scale};
}

FusetuneDropout dropout_of(const DropoutArg& arg) {
  if (!arg) return {nullptr, 0, 1.0f};
  return {pointer<int64_t>(std::get<0>(*arg)), std::get<1>(*arg), std::get<2>(*arg)};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of fusetune; conventions at the head of csrc/bindings_cuda.cpp.";
  m.def("device_count", [] {
    int error = 0;
    const int count = fusetune_device_count(&error);
    return std::make_pair(count, error);
  }, "(devices that can be used, error code).");
  m.def("error_string", &fusetune_error_string);
  m.def("capability", &fusetune_capability, "10 major + minor of the current device.");
  m.def("has_code", [](int capability) { return fusetune_has_code(capability) != 0; }, py::arg("capability"),
        "Whether this build has code for devices of that capability.");
  m.def("linear_4bit_splits", &fusetune_linear_4bit_splits, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("dtype"));
  m.def("linear_4bit_dx_splits", &fusetune_linear_4bit_dx_splits, py::arg("m"), py::arg("n"), py::arg("k"));
  m.def("linear_4bit",
        [](const MatrixArg& x, int64_t rows, const Weight4bitArg& w, const LowRankArg& tail, Address bias, Address y,
           Address workspace, int splits, Address stream) {
          const FusetuneWeight4bit weight = weight_4bit(w);
          const FusetuneLowRank low = low_rank(tail);
          const auto& [address, pitch, dtype] = x;
          return fusetune_linear_4bit(pointer<void>(address), pitch, dtype, rows, &weight, &low, pointer<float>(bias),
                                      pointer<void>(y), pointer<float>(workspace), splits, pointer<void>(stream));
        });
  m.def("linear_4bit_dx",
        [](const MatrixArg& dy, int64_t rows, const Weight4bitArg& w, const LowRankArg& tail, const DropoutArg& drop,
           Address dx, Address workspace, int splits, Address stream) {
          const FusetuneWeight4bit weight = weight_4bit(w);
          const FusetuneLowRank low = low_rank(tail);
          const FusetuneDropout dropout = dropout_of(drop);
          const auto& [address, pitch, dtype] = dy;
          return fusetune_linear_4bit_dx(pointer<void>(address), pitch, dtype, rows, &weight, &low, &dropout,
                                         pointer<void>(dx), pointer<float>(workspace), splits, pointer<void>(stream));
        });
  m.def("dequantize_4bit", [](const Weight4bitArg& w, Address out, int dtype, Address stream) {
    const FusetuneWeight4bit weight = weight_4bit(w);
    return fusetune_dequantize_4bit(&weight, pointer<void>(out), dtype, pointer<void>(stream));
  });
}
