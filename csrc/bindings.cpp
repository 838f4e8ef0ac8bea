// fusetune._C: the kernels for Python. Tensors travel as addresses, so that this module needs neither torch's
// headers nor its ABI; whoever calls has checked shapes, dtypes, devices and contiguity.
//
// Conventions (0 is a null pointer):
//   Matrix  (address, row stride in elements, dtype) with dtype 0 float32, 1 float16, 2 bfloat16
//   W4      (packed, code, absmax, absmax_q, nested_code, nested_absmax, nested_offset, nested_blocksize,
//            blocksize, rows, cols)
//   Dropout (seed, threshold, scale) or None
//   LowRank (left, right, rank, scale) or None
//   Adapters (hidden, bottleneck, rows of each group, down, up, down_bias, up_bias, activation), down and up a Matrix
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "parallel.h"

namespace py = pybind11;
using namespace fusetune;

namespace {

using Address = uintptr_t;
using MatrixArg = std::tuple<Address, int64_t, int>;
using Weight4bitArg = std::tuple<Address, Address, Address, Address, Address, Address, float, int64_t, int64_t,
                                 int64_t, int64_t>;
using DropoutArg = std::optional<std::tuple<uint64_t, uint32_t, float>>;
using LowRankArg = std::optional<std::tuple<Address, Address, int64_t, float>>;

using AdaptersArg = std::tuple<int64_t, int64_t, std::vector<int64_t>, MatrixArg, MatrixArg, Address, Address, int>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Dtype dtype(int code) {
  if (code < 0 || code > 2) throw std::invalid_argument("dtype code must be 0, 1 or 2, got " + std::to_string(code));
  return static_cast<Dtype>(code);
}

Matrix matrix(const MatrixArg& m) { return {pointer<void>(std::get<0>(m)), std::get<1>(m), dtype(std::get<2>(m))}; }

MutMatrix mut_matrix(const MatrixArg& m) {
  return {pointer<void>(std::get<0>(m)), std::get<1>(m), dtype(std::get<2>(m))};
}

Weight4bit weight_4bit(const Weight4bitArg& arg) {
  const auto& [packed, code, absmax, absmax_q, nested_code, nested_absmax, offset, nested_blocksize, blocksize, rows,
               cols] = arg;
  return {pointer<uint8_t>(packed),   pointer<float>(code),          pointer<float>(absmax),
          pointer<uint8_t>(absmax_q), pointer<float>(nested_code),   pointer<float>(nested_absmax),
          offset,                     nested_blocksize,              blocksize,
          rows,                       cols};
}

Dropout dropout_of(const DropoutArg& arg) {
  if (!arg) return {0, 0, 1.0f};
  return {std::get<0>(*arg), std::get<1>(*arg), std::get<2>(*arg)};
}

LowRank low_rank(const LowRankArg& arg) {
  if (!arg) return {nullptr, nullptr, 0, 0.0f};
  const auto& [left, right, rank, scale] = *arg;
  return {pointer<float>(left), pointer<float>(right), rank, scale};
}

Adapters adapters_of(const AdaptersArg& arg) {
  const auto& [hidden, bottleneck, rows, down, up, down_bias, up_bias, activation] = arg;
  if (activation < 0 || activation > static_cast<int>(Activation::identity)) {
    throw std::invalid_argument("no activation has the code " + std::to_string(activation));
  }
  return {static_cast<int64_t>(rows.size()), hidden, bottleneck, rows.data(), matrix(down), matrix(up),
          pointer<float>(down_bias), pointer<float>(up_bias), static_cast<Activation>(activation)};
}

// The kernel, or a clear error where this instruction set's table has none.
template <class F>
F built(F kernel, const char* name) {
  if (!kernel) throw std::runtime_error(std::string(name) + " is not built for " + kernels().isa);
  return kernel;
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

using DenseArg = std::optional<MatrixArg>;

// Calls f with the weight that exactly one of the two arguments gives.
template <class F>
void with_weight(const std::optional<Weight4bitArg>& w4, const DenseArg& dense, const F& f) {
  if (w4.has_value() == dense.has_value()) throw std::invalid_argument("give either a 4-bit or a dense weight");
  const Weight4bit quantized = w4 ? weight_4bit(*w4) : Weight4bit{};
  const Weight w = w4 ? Weight{&quantized, {}} : Weight{nullptr, matrix(*dense)};
  py::gil_scoped_release no_gil;
  f(w);
}

// Asks for huge pages under memory that nothing was written to yet. The kernel then maps 2 MB at a time, not 4 KB.
void advise_huge_pages(Address address, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr Address kPage = 4096;
  const Address begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  if (begin < end) madvise(pointer<void>(begin), end - begin, MADV_HUGEPAGE);  // advice: whether it helps or not
#else
  (void)address, (void)bytes;
#endif
}

bool has(const std::string& name) {
  const Kernels& k = kernels();
  if (name == "quantize_4bit") return k.quantize_4bit;
  if (name == "dequantize_4bit") return k.dequantize_4bit;
  if (name == "linear") return k.linear;
  if (name == "linear_dx") return k.linear_dx;
  if (name == "linear_4bit_int16") return k.linear_4bit_int16;
  if (name == "lora_shrink") return k.lora_shrink;
  if (name == "lora_ds_db") return k.lora_ds_db;
  if (name == "lora_da") return k.lora_da;
  if (name == "dora_norm") return k.dora_norm;
  if (name == "bottleneck") return k.bottleneck;
  if (name == "bottleneck_backward") return k.bottleneck_backward;
  if (name == "cross_entropy") return k.cross_entropy;
  if (name == "cross_entropy_backward") return k.cross_entropy_backward;
  if (name == "fusion_attend") return k.fusion_attend;
  if (name == "fusion_attend_backward") return k.fusion_attend_backward;
  if (name == "dropout") return k.dropout;
  if (name == "fma_peak") return k.fma_peak;
  throw std::invalid_argument("no kernel is called " + name);
}

void bind_runtime(py::module_& m) {
  m.def("isa", [] { return kernels().isa; }, "Name of the instruction set in use.");
  m.def("lanes", [] { return kernels().lanes; }, "float32 lanes of its vectors.");
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const Kernels* const* k = available_kernels(); *k; ++k) names.emplace_back((*k)->isa);
    return names;
  });
  m.def("isa_unavailable_reason", [](const std::string& isa) -> std::optional<std::string> {
    const char* reason = isa_unavailable_reason(isa.c_str());
    return reason ? std::optional<std::string>(reason) : std::nullopt;
  });
  m.def("set_isa", [](const std::string& isa) { return set_isa(isa.c_str()); },
        "Forces an instruction set ('auto': the best); False where it is not available.");
  m.def("has", &has, "Whether the instruction set in use has this kernel.");
  m.def("set_torch_pool", &set_torch_pool, py::arg("parallel_for"), py::arg("get_num_threads"));
  m.def("set_gomp_pool", &set_gomp_pool, py::arg("parallel"), py::arg("get_num_threads"));
  m.def("pool_name", &pool_name);
  m.def("num_threads", &num_threads);
  m.def("last_region_threads", &last_region_threads);
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("address"), py::arg("bytes"));
  m.def("fma_peak", [](double seconds) {
    const auto run = built(kernels().fma_peak, "fma_peak");
    py::gil_scoped_release no_gil;
    return run(seconds);
  }, "float32 FMA peak of the calling core in GF/s, measured for about `seconds`.");
}

void bind_4bit(py::module_& m) {
  m.def("quantize_4bit",
        [](Address x, int x_dtype, int64_t n, int quant_type, int64_t blocksize, Address packed, Address absmax) {
          const auto run = built(kernels().quantize_4bit, "quantize_4bit");
          const Dtype type = dtype(x_dtype);
          py::gil_scoped_release no_gil;
          run(pointer<void>(x), type, n, quant_type, blocksize, pointer<uint8_t>(packed), pointer<float>(absmax));
        });
  m.def("dequantize_4bit", [](const Weight4bitArg& w, Address out, int out_dtype) {
    const auto run = built(kernels().dequantize_4bit, "dequantize_4bit");
    const Dtype type = dtype(out_dtype);
    py::gil_scoped_release no_gil;
    run(weight_4bit(w), pointer<void>(out), type);
  });
}

void bind_linear(py::module_& m) {
  m.def("linear",
        [](const MatrixArg& x, int64_t rows, int64_t n, int64_t k, const std::optional<Weight4bitArg>& w4,
           const DenseArg& dense, Address bias, const LowRankArg& tail, const MatrixArg& y) {
          const auto run = built(kernels().linear, "linear");
          const Matrix in = matrix(x);
          const MutMatrix out = mut_matrix(y);
          with_weight(w4, dense, [&](const Weight& w) {
            run(in, rows, n, k, w, pointer<float>(bias), low_rank(tail), out);
          });
        });
  m.def("linear_dx",
        [](const MatrixArg& dy, int64_t rows, int64_t n, int64_t k, const std::optional<Weight4bitArg>& w4,
           const DenseArg& dense, const LowRankArg& tail, const DropoutArg& drop, const MatrixArg& dx) {
          const auto run = built(kernels().linear_dx, "linear_dx");
          const Matrix in = matrix(dy);
          const MutMatrix out = mut_matrix(dx);
          with_weight(w4, dense, [&](const Weight& w) {
            run(in, rows, n, k, w, low_rank(tail), dropout_of(drop), out);
          });
        });
  m.def("linear_4bit_int16",
        [](const MatrixArg& x, int64_t rows, int64_t n, int64_t k, const Weight4bitArg& w4, Address bias,
           const LowRankArg& tail, const MatrixArg& y) {
          const auto run = built(kernels().linear_4bit_int16, "linear_4bit_int16");
          const Matrix in = matrix(x);
          const MutMatrix out = mut_matrix(y);
          const Weight4bit w = weight_4bit(w4);
          py::gil_scoped_release no_gil;
          return run(in, rows, n, k, w, pointer<float>(bias), low_rank(tail), out);
        });
}

void bind_lora(py::module_& m) {
  m.def("lora_shrink", [](const MatrixArg& x, int64_t rows, int64_t k, Address lora_A, int64_t rank,
                          const DropoutArg& drop, Address s) {
    const auto run = built(kernels().lora_shrink, "lora_shrink");
    const Matrix in = matrix(x);
    py::gil_scoped_release no_gil;
    run(in, rows, k, pointer<float>(lora_A), rank, dropout_of(drop), pointer<float>(s));
  });
  m.def("lora_ds_db", [](const MatrixArg& dy, int64_t rows, int64_t n, Address lora_B, Address s, int64_t rank,
                         float scale, Address ds, Address dB) {
    const auto run = built(kernels().lora_ds_db, "lora_ds_db");
    const Matrix in = matrix(dy);
    py::gil_scoped_release no_gil;
    run(in, rows, n, pointer<float>(lora_B), pointer<float>(s), rank, scale, pointer<float>(ds), pointer<float>(dB));
  });
  m.def("lora_da", [](const MatrixArg& x, int64_t rows, int64_t k, Address ds, int64_t rank, const DropoutArg& drop,
                      Address dA) {
    const auto run = built(kernels().lora_da, "lora_da");
    const Matrix in = matrix(x);
    py::gil_scoped_release no_gil;
    run(in, rows, k, pointer<float>(ds), rank, dropout_of(drop), pointer<float>(dA));
  });
  m.def("dora_norm", [](const std::optional<Weight4bitArg>& w4, const DenseArg& dense, int64_t n, int64_t k,
                        Address lora_A, Address lora_B, int64_t rank, float scale, Address norm) {
    const auto run = built(kernels().dora_norm, "dora_norm");
    with_weight(w4, dense, [&](const Weight& w) {
      run(w, n, k, pointer<float>(lora_A), pointer<float>(lora_B), rank, scale, pointer<float>(norm));
    });
  });
  m.def("dropout", [](const MatrixArg& x, int64_t rows, int64_t k, const DropoutArg& drop, const MatrixArg& out) {
    const auto run = built(kernels().dropout, "dropout");
    const Matrix in = matrix(x);
    const MutMatrix to = mut_matrix(out);
    py::gil_scoped_release no_gil;
    run(in, rows, k, dropout_of(drop), to);
  });
}

void bind_adapters(py::module_& m) {
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

void bind_loss(py::module_& m) {
  m.def("cross_entropy", [](const MatrixArg& logits, int64_t rows, int64_t v, Address target, int64_t ignore_index,
                            float smoothing, Address loss, Address lse) {
    const auto run = built(kernels().cross_entropy, "cross_entropy");
    const Matrix in = matrix(logits);
    py::gil_scoped_release no_gil;
    return run(in, rows, v, pointer<int64_t>(target), ignore_index, smoothing, pointer<float>(loss),
               pointer<float>(lse));
  });
  m.def("cross_entropy_backward",
        [](const MatrixArg& logits, int64_t rows, int64_t v, Address target, int64_t ignore_index, float smoothing,
           Address lse, Address dloss, const MatrixArg& dlogits) {
          const auto run = built(kernels().cross_entropy_backward, "cross_entropy_backward");
          const Matrix in = matrix(logits);
          const MutMatrix out = mut_matrix(dlogits);
          py::gil_scoped_release no_gil;
          run(in, rows, v, pointer<int64_t>(target), ignore_index, smoothing, pointer<float>(lse),
              pointer<float>(dloss), out);
        });
}

void bind_fusion(py::module_& m) {
  m.def("fusion_attend",
        [](const MatrixArg& g, int64_t rows, int64_t h, const std::vector<MatrixArg>& values, Address offset,
           float temperature, const DropoutArg& dropout, const MatrixArg& ctx, Address p) {
          const auto run = built(kernels().fusion_attend, "fusion_attend");
          const Matrix in = matrix(g);
          const MutMatrix out = mut_matrix(ctx);
          const FusionMatrices matrices(values);
          py::gil_scoped_release no_gil;
          run(in, rows, h, matrices.values(), pointer<float>(offset), temperature, dropout_of(dropout), out,
              pointer<float>(p));
        });
  m.def("fusion_attend_backward",
        [](const MatrixArg& dctx, const MatrixArg& g, int64_t rows, int64_t h, const std::vector<MatrixArg>& values,
           Address p, float temperature, const DropoutArg& dropout, const MatrixArg& dg,
           const std::vector<Address>& dvalues, Address doffset) {
          const auto run = built(kernels().fusion_attend_backward, "fusion_attend_backward");
          const Matrix upper = matrix(dctx), in = matrix(g);
          const MutMatrix out = mut_matrix(dg);
          const FusionMatrices matrices(values);
          std::vector<void*> gradients;
          for (const Address address : dvalues) gradients.push_back(pointer<void>(address));
          py::gil_scoped_release no_gil;
          run(upper, in, rows, h, matrices.values(), pointer<float>(p), temperature, dropout_of(dropout), out,
              gradients.empty() ? nullptr : gradients.data(), pointer<float>(doffset));
        });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of fusetune; conventions at the head of csrc/bindings.cpp.";
  bind_runtime(m);
  bind_4bit(m);
  bind_linear(m);
  bind_lora(m);
  bind_adapters(m);
  bind_loss(m);
  bind_fusion(m);
}
