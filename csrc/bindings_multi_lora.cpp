// The part of fusetune._C that binds layers under several LoRA adapters. Conventions as in bindings.h, and
//   LoraAdapter (rank, rows, blocks or None, block, lora_A, lora_B, bias, scale, Dropout, s, ds, dA, dB)
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace fusetune {

namespace {

using LoraAdapterArg = std::tuple<int64_t, int64_t, std::optional<std::vector<int64_t>>, int64_t, Address, Address,
                                  Address, float, DropoutArg, Address, Address, Address, Address>;
using LoraAdaptersArg = std::vector<LoraAdapterArg>;

// The adapters as the kernels take them; the argument must outlive them.
std::vector<LoraAdapter> adapters_of(const LoraAdaptersArg& args) {
  std::vector<LoraAdapter> adapters;
  for (const auto& [rank, rows, blocks, block, lora_A, lora_B, bias, scale, dropout, s, ds, dA, dB] : args) {
    adapters.push_back({rank, rows, blocks ? blocks->data() : nullptr, block, pointer<float>(lora_A),
                        pointer<float>(lora_B), pointer<float>(bias), scale, dropout_of(dropout), pointer<float>(s),
                        pointer<float>(ds), pointer<float>(dA), pointer<float>(dB)});
  }
  return adapters;
}

LoraAdapters all_of(const std::vector<LoraAdapter>& adapters) {
  return {adapters.data(), static_cast<int64_t>(adapters.size())};
}

}  // namespace

void bind_multi_lora(py::module_& m) {
  m.def("multi_lora_shrink", [](const MatrixArg& x, int64_t k, const LoraAdaptersArg& args) {
    const auto run = built(kernels().multi_lora_shrink, "multi_lora_shrink");
    const Matrix in = matrix(x);
    const auto adapters = adapters_of(args);
    py::gil_scoped_release no_gil;
    run(in, k, all_of(adapters));
  });
  m.def("multi_lora_expand",
        [](const MatrixArg& out, int64_t rows, int64_t cols, const LoraAdaptersArg& args, bool backward) {
          const auto run = built(kernels().multi_lora_expand, "multi_lora_expand");
          const MutMatrix to = mut_matrix(out);
          const auto adapters = adapters_of(args);
          py::gil_scoped_release no_gil;
          run(to, rows, cols, all_of(adapters), backward);
        });
  m.def("multi_lora_ds_db", [](const MatrixArg& dy, int64_t n, const LoraAdaptersArg& args) {
    const auto run = built(kernels().multi_lora_ds_db, "multi_lora_ds_db");
    const Matrix in = matrix(dy);
    const auto adapters = adapters_of(args);
    py::gil_scoped_release no_gil;
    run(in, n, all_of(adapters));
  });
  m.def("multi_lora_da", [](const MatrixArg& x, int64_t k, const LoraAdaptersArg& args) {
    const auto run = built(kernels().multi_lora_da, "multi_lora_da");
    const Matrix in = matrix(x);
    const auto adapters = adapters_of(args);
    py::gil_scoped_release no_gil;
    run(in, k, all_of(adapters));
  });
}

}  // namespace fusetune
