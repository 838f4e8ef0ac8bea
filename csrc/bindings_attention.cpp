// The part of fusetune._C that binds attention and the rotation of its operands. Conventions as in bindings.h, and
//   Attention (sizes B, Hq, Hkv, T, S, D; query, key, value as Heads; bias: address and three distances; causal, scale,
//             dropout; prefix: key and value [G, Hkv, P, D] as Heads, G, P, rows)
#include <array>

#include "bindings.h"

namespace py = pybind11;

namespace fusetune {

namespace {

using JoinedPrefixArg = std::tuple<HeadsArg, HeadsArg, int64_t, int64_t, Address>;
using AttentionArg = std::tuple<std::array<int64_t, 6>, HeadsArg, HeadsArg, HeadsArg, DistancesArg, bool, float,
                                DropoutArg, JoinedPrefixArg>;

Attention attention_of(const AttentionArg& arg) {
  const auto& [sizes, query, key, value, bias, causal, scale, drop, prefix] = arg;
  const auto& [prefix_key, prefix_value, groups, count, rows] = prefix;
  const auto& [batch, query_heads, kv_heads, tokens, keys, dim] = sizes;
  const auto& [address, bias_batch, bias_head, bias_token] = bias;
  return {batch, query_heads, kv_heads, tokens, keys, dim, heads(query), heads(key), heads(value),
          pointer<float>(address), bias_batch, bias_head, bias_token, causal, scale, dropout_of(drop),
          {heads(prefix_key), heads(prefix_value), groups, count, pointer<int64_t>(rows)}};
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention", [](const AttentionArg& arg, const HeadsArg& out, Address lse) {
    const auto run = built(kernels().attention, "attention");
    const Attention attention = attention_of(arg);
    const Heads to = heads(out);
    py::gil_scoped_release no_gil;
    run(attention, to, pointer<float>(lse));
  });
  m.def("attention_backward", [](const AttentionArg& arg, const HeadsArg& dout, const HeadsArg& out, Address lse,
                                 const HeadsArg& dquery, const HeadsArg& dkey, const HeadsArg& dvalue,
                                 Address dprefix_key, Address dprefix_value) {
    const auto run = built(kernels().attention_backward, "attention_backward");
    const Attention attention = attention_of(arg);
    const AttentionGradients given = {
        heads(dout), heads(out),    pointer<float>(lse),         heads(dquery),
        heads(dkey), heads(dvalue), pointer<float>(dprefix_key), pointer<float>(dprefix_value)};
    py::gil_scoped_release no_gil;
    run(attention, given);
  });
  m.def("rotary", [](const HeadsArg& x, const std::array<int64_t, 4>& sizes, const HeadsArg& cos, const HeadsArg& sin,
                     bool transposed, const HeadsArg& out) {
    const auto run = built(kernels().rotary, "rotary");
    const RotaryShape shape = {sizes[0], sizes[1], sizes[2], sizes[3]};
    const Heads from = heads(x), to = heads(out), c = heads(cos), s = heads(sin);
    py::gil_scoped_release no_gil;
    run(from, shape, c, s, transposed, to);
  });
}

}  // namespace fusetune
