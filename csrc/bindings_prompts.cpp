// The part of fusetune._C that binds prompts. Conventions as in bindings.h, and
//   PromptLayout (batch, tokens, length, groups, slots, slots_ld, rows)
#include "bindings.h"

namespace py = pybind11;

namespace fusetune {

namespace {

using PromptLayoutArg = std::tuple<int64_t, int64_t, int64_t, int64_t, Address, int64_t, Address>;

PromptLayout layout_of(const PromptLayoutArg& arg) {
  const auto& [batch, tokens, length, groups, slots, slots_ld, rows] = arg;
  return {batch, tokens, length, groups, pointer<int64_t>(slots), slots_ld, pointer<int64_t>(rows)};
}

void bind_prompt_embed(py::module_& m) {
  m.def("prompt_embed", [](Address input_ids, const PromptLayoutArg& layout, const MatrixArg& weight,
                           int64_t vocabulary, int64_t h, const MatrixArg& prompt, float scale, const MatrixArg& out) {
    const auto run = built(kernels().prompt_embed, "prompt_embed");
    const PromptLayout places = layout_of(layout);
    const Matrix table = matrix(weight), first = matrix(prompt);
    const MutMatrix to = mut_matrix(out);
    py::gil_scoped_release no_gil;
    return run(pointer<int64_t>(input_ids), places, table, vocabulary, h, first, scale, to);
  });
  m.def("prompt_embed_dprompt",
        [](const MatrixArg& dout, const PromptLayoutArg& layout, int64_t h, Address dprompt) {
          const auto run = built(kernels().prompt_embed_dprompt, "prompt_embed_dprompt");
          const PromptLayout places = layout_of(layout);
          const Matrix upper = matrix(dout);
          py::gil_scoped_release no_gil;
          run(upper, places, h, pointer<float>(dprompt));
        });
  m.def("prompt_embed_dweight",
        [](const MatrixArg& dout, const PromptLayoutArg& layout, int64_t h, Address ids, Address order,
           int64_t vocabulary, float scale, int64_t padding_idx, const MatrixArg& dweight) {
          const auto run = built(kernels().prompt_embed_dweight, "prompt_embed_dweight");
          const PromptLayout places = layout_of(layout);
          const Matrix upper = matrix(dout);
          const MutMatrix to = mut_matrix(dweight);
          py::gil_scoped_release no_gil;
          run(upper, places, h, pointer<int64_t>(ids), pointer<int64_t>(order), vocabulary, scale, padding_idx, to);
        });
}

}  // namespace

void bind_prompts(py::module_& m) {
  bind_prompt_embed(m);
}

}  // namespace fusetune
