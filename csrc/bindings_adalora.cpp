// The part of fusetune._C that binds AdaLoRA. Conventions as in bindings.h.
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace fusetune {

namespace {

// (weight, grad or 0, sensitivity, uncertainty, rows, cols) of each matrix; fp32, without gaps.
using ImportanceArg = std::vector<std::tuple<Address, Address, Address, Address, int64_t, int64_t>>;

}  // namespace

void bind_adalora(py::module_& m) {
  m.def("importance", [](const ImportanceArg& matrices, double beta1, double beta2, bool by_column, Address scores) {
    const auto run = built(kernels().importance, "importance");
    std::vector<const float*> weights, grads;
    std::vector<float*> sensitivity, uncertainty;
    std::vector<int64_t> rows, cols, first;
    int64_t next = 0;
    for (const auto& [w, g, s, u, r, c] : matrices) {
      weights.push_back(pointer<float>(w)), grads.push_back(pointer<float>(g));
      sensitivity.push_back(pointer<float>(s)), uncertainty.push_back(pointer<float>(u));
      rows.push_back(r), cols.push_back(c), first.push_back(next);
      next += by_column ? c : r;
    }
    const ImportanceMatrices all = {static_cast<int64_t>(matrices.size()), weights.data(), grads.data(),
                                    sensitivity.data(), uncertainty.data(), rows.data(), cols.data(), first.data()};
    py::gil_scoped_release no_gil;
    run(all, static_cast<float>(beta1), static_cast<float>(1 - beta1), static_cast<float>(beta2),
        static_cast<float>(1 - beta2), by_column, pointer<float>(scores));
  });
}

}  // namespace fusetune
