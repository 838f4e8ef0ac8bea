"""Layers of PEFT that have no fused path, each with its reason, and D3: what merging leaves out."""

import importlib

import bitsandbytes as bnb
import pytest
import tiny_models
import torch
from torch import nn

import fusetune
from fusetune import ops

LAYER = "base_model.model.model.layers.0.mlp.gate_proj"


def in_8_bits(model):
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            layer = bnb.nn.Linear8bitLt(
                module.in_features, module.out_features, bias=False, has_fp16_weights=False
            )
            weight = module.weight.data.clone()
            layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            model.set_submodule(name, layer.to("cpu"))
    model.is_loaded_in_8bit = True
    return model


def test_8_bit_layers(calls):
    torch.manual_seed(0)
    model, inputs = tiny_models.llama(1)
    stock = tiny_models.with_lora(in_8_bits(model), target_modules=["gate_proj", "q_proj"])
    layer = stock.get_submodule(LAYER)
    assert type(layer).__name__ == "Linear8bitLt"
    report = fusetune.fuse(stock, loss=False)
    reasons = {row.module: (row.method, row.reason) for row in report.stock}
    assert reasons[LAYER] == ("LoRA", "lora.Linear8bitLt has no fused path")
    assert type(layer).__module__.startswith("peft.")
    assert stock(**inputs).loss.isfinite()
    assert not {"lora_linear", "linear_4bit"} & set(calls)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("gptq", "GPTQLoraLinear"),
        ("awq", "AwqLoraLinear"),
        ("aqlm", "AqlmLoraLinear"),
        ("torchao", "TorchaoLoraLinear"),
        ("tp_layer", "LoraParallelLinear"),
    ],
)
def test_layers_over_other_quantisations(module, name):
    """Their libraries are not here: the classes alone, without what they would wrap."""
    kind = getattr(importlib.import_module(f"peft.tuners.lora.{module}"), name)
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    [row] = fusetune.fuse(nn.Sequential(layer)).rows
    assert (row.method, row.reason) == ("LoRA", f"lora.{name} has no fused path")
    assert type(layer) is kind


# --- D3 -------------------------------------------------------------------------------------------


def with_lora_bias(four_bit):
    torch.manual_seed(0)
    model, _ = tiny_models.bert()
    if four_bit:
        tiny_models.quantize(model, compress_statistics=False)
    model = tiny_models.with_lora(model, lora_bias=True, target_modules=["intermediate.dense"])
    return model, model.get_submodule("base_model.model.bert.encoder.layer.0.intermediate.dense")


@pytest.mark.filterwarnings("ignore:.*[mM]erge lora module to 4-bit")
@pytest.mark.parametrize("four_bit", [False, True])
def test_d3_peft_merges_the_bias_of_a_4_bit_layer_without_scaling(four_bit):
    """Merging stays PEFT's on a fused layer, with this fault; unmerging undoes just that."""
    model, layer = with_lora_bias(four_bit)
    fusetune.fuse(model)
    before = layer.base_layer.bias.clone()
    added = layer.lora_B["default"].bias.detach()
    assert layer.scaling["default"] == 2.0
    assert added.abs().max() > 0.01
    layer.merge()
    merged = before + (added if four_bit else 2 * added)
    torch.testing.assert_close(layer.base_layer.bias.data, merged)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.bias.data, before)


@pytest.mark.parametrize("four_bit", [False, True])
def test_d3_the_fused_forward_scales_it_and_so_can_a_merge(four_bit, calls):
    """ops.merge_lora gives the weight; the bias beside it is bias + scaling * lora_bias."""
    model, layer = with_lora_bias(four_bit)
    fusetune.fuse(model)
    x = torch.randn(9, 64)
    y = layer(x)
    assert calls == ["lora_linear"]
    base = layer.base_layer
    weight = base.fused_weight() if four_bit else base.weight
    lora_A, lora_B = layer.lora_A["default"], layer.lora_B["default"]
    with torch.no_grad():
        merged = ops.merge_lora(weight, lora_A.weight, lora_B.weight, 2.0, torch.float32)
        bias = base.bias + 2.0 * lora_B.bias
        torch.testing.assert_close(x @ merged.T + bias, y, rtol=1e-5, atol=1e-5)
