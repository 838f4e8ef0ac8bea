// rms_norm for Python; conventions at the head of bindings.h.
#include "bindings.h"

namespace py = pybind11;

namespace fusetune {

void bind_norm(py::module_& m) {
  m.def("rms_norm",
        [](const MatrixArg& x, int64_t rows, int64_t n, Address weight, float eps, const MatrixArg& y, Address rstd) {
          const auto run = built(kernels().rms_norm, "rms_norm");
          const Matrix in = matrix(x);
          const MutMatrix out = mut_matrix(y);
          py::gil_scoped_release no_gil;
          run(in, rows, n, pointer<float>(weight), eps, out, pointer<float>(rstd));
        });
  m.def("rms_norm_dx", [](const MatrixArg& dy, const MatrixArg& x, int64_t rows, int64_t n, Address weight,
                          Address rstd, const MatrixArg& dx) {
    const auto run = built(kernels().rms_norm_dx, "rms_norm_dx");
    const Matrix upper = matrix(dy), in = matrix(x);
    const MutMatrix out = mut_matrix(dx);
    py::gil_scoped_release no_gil;
    run(upper, in, rows, n, pointer<float>(weight), pointer<float>(rstd), out);
  });
}

}  // namespace fusetune
