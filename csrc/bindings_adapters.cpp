// The part of fusetune._C that binds adapters: bottleneck and AdapterFusion. Conventions as in bindings.h, and
//   Adapters (hidden, bottleneck, rows of each group, down, up, down_bias, up_bias, activation), down and up a Matrix
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace fusetune {

namespace {

using AdaptersArg = std::tuple<int64_t, int64_t, std::vector<int64_t>, MatrixArg, MatrixArg, Address, Address, int>;

Adapters adapters_of(const AdaptersArg& arg) {
  const auto& [hidden, bottleneck, rows, down, up, down_bias, up_bias, activation] = arg;
  if (activation < 0 || activation > static_cast<int>(Activation::identity)) {
    throw std::invalid_argument("no activation has the code " + std::to_string(activation));
  }
  return {static_cast<int64_t>(rows.size()), hidden, bottleneck, rows.data(), matrix(down), matrix(up),
          pointer<float>(down_bias), pointer<float>(up_bias), static_cast<Activation>(activation)};
}

// The matrices of N adapters, as the kernels take them.
class FusionMatrices {
 public:
  explicit FusionMatrices(const std::vector<MatrixArg>& values) : dtype_(dtype(std::get<2>(values.at(0)))) {
    for (const auto& [address, ld, code] : values) {
      if (dtype(code) != dtype_) throw std::invalid_argument("the adapters' values must be of one dtype");
      data_.push_back(pointer<void>(address));
      ld_.push_back(ld);
    }
  }
  FusionValues values() const { return {data_.data(), ld_.data(), static_cast<int64_t>(data_.size()), dtype_}; }

 private:
  Dtype dtype_;
  std::vector<const void*> data_;
  std::vector<int64_t> ld_;
};

void bind_bottleneck(py::module_& m) {
  m.def("bottleneck", [](const MatrixArg& x, int64_t rows, const AdaptersArg& adapters, const MatrixArg& addend,
                         const DropoutArg& drop, const MatrixArg& y, const MatrixArg& z) {
    const auto run = built(kernels().bottleneck, "bottleneck");
    const Adapters all = adapters_of(adapters);
    const Matrix in = matrix(x), added = matrix(addend);
    const MutMatrix out = mut_matrix(y), kept = mut_matrix(z);
    py::gil_scoped_release no_gil;
    run(in, rows, all, added, dropout_of(drop), out, kept);
  });
  m.def("bottleneck_backward",
        [](const MatrixArg& dy, const MatrixArg& x, const MatrixArg& z, int64_t rows, const AdaptersArg& adapters,
           const MatrixArg& addend, const DropoutArg& drop, const MatrixArg& dx, const MatrixArg& d_down,
           const MatrixArg& d_up, Address d_down_bias, Address d_up_bias) {
          const auto run = built(kernels().bottleneck_backward, "bottleneck_backward");
          const Adapters all = adapters_of(adapters);
          const Matrix from = matrix(dy), in = matrix(x), kept = matrix(z), added = matrix(addend);
          const AdapterGradients out = {mut_matrix(dx), mut_matrix(d_down), mut_matrix(d_up),
                                        pointer<float>(d_down_bias), pointer<float>(d_up_bias)};
          py::gil_scoped_release no_gil;
          run(from, in, kept, rows, all, added, dropout_of(drop), out);
        });
}

void bind_fusion(py::module_& m) {
  m.def("fusion_attend",
        [](const MatrixArg& g, int64_t rows, int64_t h, const std::vector<MatrixArg>& values, Address offset,
           float temperature, const DropoutArg& dropout, int64_t first_row, const MatrixArg& ctx, Address p) {
          const auto run = built(kernels().fusion_attend, "fusion_attend");
          const Matrix in = matrix(g);
          const MutMatrix out = mut_matrix(ctx);
          const FusionMatrices matrices(values);
          py::gil_scoped_release no_gil;
          run(in, rows, h, matrices.values(), pointer<float>(offset), temperature, dropout_of(dropout),
              first_row, out, pointer<float>(p));
        });
  m.def("fusion_attend_backward",
        [](const MatrixArg& dctx, const MatrixArg& g, int64_t rows, int64_t h, const std::vector<MatrixArg>& values,
           Address p, float temperature, const DropoutArg& dropout, int64_t first_row, const MatrixArg& dg,
           const MatrixArg& ctx, const std::vector<Address>& dvalues, Address doffset) {
          const auto run = built(kernels().fusion_attend_backward, "fusion_attend_backward");
          const Matrix upper = matrix(dctx), in = matrix(g);
          const MutMatrix out = mut_matrix(dg), attended = mut_matrix(ctx);
          const FusionMatrices matrices(values);
          std::vector<void*> gradients;
          for (const Address address : dvalues) gradients.push_back(pointer<void>(address));
          py::gil_scoped_release no_gil;
          run(upper, in, rows, h, matrices.values(), pointer<float>(p), temperature, dropout_of(dropout),
              first_row, out, attended, gradients.empty() ? nullptr : gradients.data(), pointer<float>(doffset));
        });
}

}  // namespace

void bind_adapters(py::module_& m) {
  bind_bottleneck(m);
  bind_fusion(m);
}

}  // namespace fusetune
