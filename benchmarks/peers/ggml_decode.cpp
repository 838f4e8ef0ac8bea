// A chain of `layers` products of one vector with IQ4_NL weights in ggml's CPU_REPACK layout, for ggml_decode.py.
#include <cstring>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

struct Runner {
  ggml_cgraph* graph;
  ggml_tensor* y;
  ggml_cplan plan;
  std::vector<uint8_t> work;
};
Runner runner;

// The buffer type that repacks weights for the CPU at hand; null where this build has none.
ggml_backend_buffer_type_t repacking() {
  const auto device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  const auto list = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
      ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
  if (!list) return nullptr;
  for (auto* type = list(device); type && *type; ++type) {
    if (std::strstr(ggml_backend_buft_name(*type), "REPACK")) return *type;
  }
  return nullptr;
}

}  // namespace

// weight [n, k], x [k]. False where ggml does not repack.
extern "C" bool prepare(int n, int k, int layers, int threads, const float* weight, const float* x_values) {
  const auto type = repacking();
  if (!type) return false;
  ggml_context* context = ggml_init({size_t{16} << 20, nullptr, true});
  std::vector<ggml_tensor*> weights;
  std::vector<uint8_t> quantized;
  for (int i = 0; i < layers; ++i) {
    ggml_tensor* w = ggml_new_tensor_2d(context, GGML_TYPE_IQ4_NL, k, n);
    const auto buffer = ggml_backend_buft_alloc_buffer(type, ggml_nbytes(w));
    ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    ggml_backend_tensor_alloc(buffer, w, ggml_backend_buffer_get_base(buffer));
    if (quantized.empty()) {
      quantized.resize(ggml_nbytes(w));
      ggml_quantize_chunk(GGML_TYPE_IQ4_NL, weight, quantized.data(), 0, n, k, nullptr);
    }
    ggml_backend_tensor_set(w, quantized.data(), 0, quantized.size());
    weights.push_back(w);
  }
  ggml_tensor* x = ggml_new_tensor_1d(context, GGML_TYPE_F32, k);
  runner.graph = ggml_new_graph(context);
  for (ggml_tensor* w : weights) ggml_build_forward_expand(runner.graph, runner.y = ggml_mul_mat(context, w, x));
  ggml_backend_alloc_ctx_tensors_from_buft(context, ggml_backend_cpu_buffer_type());
  std::memcpy(x->data, x_values, ggml_nbytes(x));
  ggml_threadpool_params pool = ggml_threadpool_params_default(threads);
  pool.poll = 100;  // its threads wait awake, as torch's do
  runner.plan = ggml_graph_plan(runner.graph, threads, ggml_threadpool_new(&pool));
  runner.work.resize(runner.plan.work_size);
  runner.plan.work_data = runner.work.data();
  return true;
}

extern "C" void run() { ggml_graph_compute(runner.graph, &runner.plan); }

extern "C" void result(float* y) { std::memcpy(y, runner.y->data, ggml_nbytes(runner.y)); }
