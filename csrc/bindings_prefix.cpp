// The part of fusetune._C that binds attention to a prefix. Conventions as in bindings.h, and
//   Prefix (sizes B, Hq, Hkv, T, D, G, P; query, key, value as Heads; bias: address and three distances; rows, lengths,
//          scale, window, position, dropout)
#include <array>

#include "bindings.h"

namespace py = pybind11;

namespace fusetune {

namespace {

using PrefixArg = std::tuple<std::array<int64_t, 7>, HeadsArg, HeadsArg, HeadsArg, DistancesArg, Address, Address,
                             float, int64_t, int64_t, DropoutArg>;

Prefix prefix_of(const PrefixArg& arg) {
  const auto& [sizes, query, key, value, bias, rows, lengths, scale, window, position, drop] = arg;
  const auto& [batch, query_heads, kv_heads, tokens, dim, groups, count] = sizes;
  const auto& [bias_address, bias_batch, bias_head, bias_token] = bias;
  return {batch, query_heads, kv_heads, tokens, dim, groups, count, heads(query), heads(key), heads(value),
          pointer<float>(bias_address), bias_batch, bias_head, bias_token, pointer<int64_t>(rows),
          pointer<int64_t>(lengths), scale, window, position, dropout_of(drop)};
}

}  // namespace

void bind_prefix(py::module_& m) {
  m.def("prefix_attend", [](const PrefixArg& arg, const HeadsArg& out, const DistancesArg& base_lse, Address lse) {
    const auto run = built(kernels().prefix_attend, "prefix_attend");
    const Prefix prefix = prefix_of(arg);
    const Heads merged = heads(out);
    const auto& [address, batch, head, token] = base_lse;
    py::gil_scoped_release no_gil;
    run(prefix, merged, {pointer<float>(address), batch, head, token}, pointer<float>(lse));
  });
  m.def("prefix_attend_backward",
        [](const PrefixArg& arg, const HeadsArg& dout, const HeadsArg& out, Address lse, const HeadsArg& dquery, bool add,
           Address dkey, Address dvalue) {
          const auto run = built(kernels().prefix_attend_backward, "prefix_attend_backward");
          const Prefix prefix = prefix_of(arg);
          const PrefixGradients given = {heads(dout), heads(out), pointer<float>(lse), heads(dquery), add,
                                         pointer<float>(dkey), pointer<float>(dvalue)};
          py::gil_scoped_release no_gil;
          run(prefix, given);
        });
}

}  // namespace fusetune
