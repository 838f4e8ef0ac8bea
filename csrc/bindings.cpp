// fusetune._C: the kernels for Python. Tensors travel as addresses, so that this module needs neither torch's
// headers nor its ABI; whoever calls has checked shapes, dtypes, devices and contiguity.
//
// Conventions as in bindings.h, and
//   W4      (packed, code, absmax, absmax_q, nested_code, nested_absmax, nested_offset, nested_blocksize,
//            blocksize, rows, cols)
//   LowRank (left, right, rank, scale) or None

#include <vector>

#include "bindings.h"
#include "parallel.h"

namespace py = pybind11;
using namespace fusetune;

namespace {

using Weight4bitArg = std::tuple<Address, Address, Address, Address, Address, Address, float, int64_t, int64_t,
                                 int64_t, int64_t>;
using LowRankArg = std::optional<std::tuple<Address, Address, int64_t, float>>;
using DenseArg = std::optional<MatrixArg>;

Weight4bit weight_4bit(const Weight4bitArg& arg) {
  const auto& [packed, code, absmax, absmax_q, nested_code, nested_absmax, offset, nested_blocksize, blocksize, rows,
               cols] = arg;
  return {pointer<uint8_t>(packed),   pointer<float>(code),          pointer<float>(absmax),
          pointer<uint8_t>(absmax_q), pointer<float>(nested_code),   pointer<float>(nested_absmax),
          offset,                     nested_blocksize,              blocksize,
          rows,                       cols};
}

LowRank low_rank(const LowRankArg& arg) {
  if (!arg) return {nullptr, nullptr, 0, 0.0f};
  const auto& [left, right, rank, scale] = *arg;
  return {pointer<float>(left), pointer<float>(right), rank, scale};
}

// Calls f with the weight that exactly one of the two arguments gives.
template <class F>
void with_weight(const std::optional<Weight4bitArg>& w4, const DenseArg& dense, const F& f) {
  if (w4.has_value() == dense.has_value()) throw std::invalid_argument("give either a 4-bit or a dense weight");
  const Weight4bit quantized = w4 ? weight_4bit(*w4) : Weight4bit{};
  const Weight w = w4 ? Weight{&quantized, {}} : Weight{nullptr, matrix(*dense)};
  py::gil_scoped_release no_gil;
  f(w);
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
  if (name == "multi_lora_shrink") return k.multi_lora_shrink;
  if (name == "multi_lora_expand") return k.multi_lora_expand;
  if (name == "multi_lora_ds_db") return k.multi_lora_ds_db;
  if (name == "multi_lora_da") return k.multi_lora_da;
  if (name == "dora_norm") return k.dora_norm;
  if (name == "rms_norm") return k.rms_norm;
  if (name == "rms_norm_dx") return k.rms_norm_dx;
  if (name == "bottleneck") return k.bottleneck;
  if (name == "bottleneck_backward") return k.bottleneck_backward;
  if (name == "cross_entropy") return k.cross_entropy;
  if (name == "cross_entropy_backward") return k.cross_entropy_backward;
  if (name == "fusion_attend") return k.fusion_attend;
  if (name == "fusion_attend_backward") return k.fusion_attend_backward;
  if (name == "prompt_embed") return k.prompt_embed;
  if (name == "prompt_embed_dprompt") return k.prompt_embed_dprompt;
  if (name == "prompt_embed_dweight") return k.prompt_embed_dweight;
  if (name == "prefix_attend") return k.prefix_attend;
  if (name == "prefix_attend_backward") return k.prefix_attend_backward;
  if (name == "attention") return k.attention;
  if (name == "attention_backward") return k.attention_backward;
  if (name == "rotary") return k.rotary;
  if (name == "glu") return k.glu;
  if (name == "glu_backward") return k.glu_backward;
  if (name == "importance") return k.importance;
  if (name == "scale_columns") return k.scale_columns;
  if (name == "scale_columns_backward") return k.scale_columns_backward;
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
  m.def("is_intel", [] {
#if defined(__x86_64__)
    return __builtin_cpu_is("intel") != 0;
#else
    return false;
#endif
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
  const auto linear_dx = [](bool add) {
    return [add](const MatrixArg& dy, int64_t rows, int64_t n, int64_t k, const std::optional<Weight4bitArg>& w4,
                 const DenseArg& dense, const LowRankArg& tail, const DropoutArg& drop, const MatrixArg& dx) {
      const auto run = built(kernels().linear_dx, "linear_dx");
      const Matrix in = matrix(dy);
      const MutMatrix out = mut_matrix(dx);
      with_weight(w4, dense,
                  [&](const Weight& w) { run(in, rows, n, k, w, low_rank(tail), dropout_of(drop), add, out); });
    };
  };
  m.def("linear_dx", linear_dx(false));
  m.def("linear_dx_add", linear_dx(true), "The same, added to dx.");
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

// Of glu's activations only: kernels trust their caller.
Activation gate_activation(int code) {
  const auto kind = static_cast<Activation>(code);
  if (kind == Activation::silu || kind == Activation::gelu || kind == Activation::gelu_new) return kind;
  throw std::invalid_argument("glu has no activation of the code " + std::to_string(code));
}

void bind_glu(py::module_& m) {
  m.def("glu", [](const MatrixArg& gate, const MatrixArg& up, int64_t rows, int64_t n, int code, const MatrixArg& y) {
    const auto run = built(kernels().glu, "glu");
    const Matrix left = matrix(gate), right = matrix(up);
    const MutMatrix out = mut_matrix(y);
    const Activation kind = gate_activation(code);
    py::gil_scoped_release no_gil;
    run(left, right, rows, n, kind, out);
  });
  m.def("glu_backward", [](const MatrixArg& dy, const MatrixArg& gate, const MatrixArg& up, int64_t rows, int64_t n,
                           int code, const MatrixArg& dgate, const MatrixArg& dup) {
    const auto run = built(kernels().glu_backward, "glu_backward");
    const Matrix upper = matrix(dy), left = matrix(gate), right = matrix(up);
    const MutMatrix dleft = mut_matrix(dgate), dright = mut_matrix(dup);
    const Activation kind = gate_activation(code);
    py::gil_scoped_release no_gil;
    run(upper, left, right, rows, n, kind, dleft, dright);
  });
}

void bind_scale_columns(py::module_& m) {
  m.def("scale_columns",
        [](const MatrixArg& x, int64_t rows, int64_t n, Address scale, Address bias, const MatrixArg& y) {
          const auto run = built(kernels().scale_columns, "scale_columns");
          const Matrix in = matrix(x);
          const MutMatrix out = mut_matrix(y);
          py::gil_scoped_release no_gil;
          run(in, rows, n, pointer<float>(scale), pointer<float>(bias), out);
        });
  m.def("scale_columns_backward", [](const MatrixArg& dy, const MatrixArg& x, int64_t rows, int64_t n, Address scale,
                                     const MatrixArg& dx, Address dscale, Address dbias) {
    const auto run = built(kernels().scale_columns_backward, "scale_columns_backward");
    const Matrix upper = matrix(dy), in = matrix(x);
    const MutMatrix out = mut_matrix(dx);
    py::gil_scoped_release no_gil;
    run(upper, in, rows, n, pointer<float>(scale), out, pointer<float>(dscale), pointer<float>(dbias));
  });
  // Its sums of dy alone. Few rows are summed in a microsecond: dy's arguments are no tuple, the others are left out.
  m.def("column_sums", [](Address dy, int64_t ld, int code, int64_t rows, int64_t n, Address sums) {
    const auto run = built(kernels().scale_columns_backward, "scale_columns_backward");
    const Matrix upper = {pointer<void>(dy), ld, dtype(code)};
    py::gil_scoped_release no_gil;
    run(upper, {}, rows, n, nullptr, {}, nullptr, pointer<float>(sums));
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of fusetune; conventions at the head of csrc/bindings.h and of the files that include it.";
  bind_runtime(m);
  bind_4bit(m);
  bind_linear(m);
  bind_lora(m);
  bind_blocks(m);
  bind_norm(m);
  bind_multi_lora(m);
  bind_adapters(m);
  bind_attention(m);
  bind_prefix(m);
  bind_prompts(m);
  bind_glu(m);
  bind_scale_columns(m);
  bind_adalora(m);
  bind_loss(m);
}
