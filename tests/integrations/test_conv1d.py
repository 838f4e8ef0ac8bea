"""LoRA over transformers' Conv1D (GPT-2), whose weight is the transpose of a linear layer's."""

import copy

import pytest
import tiny_models
import torch
from model_equality import assert_near, float64_copy, step
from peft import LoraConfig
from peft.tuners import lora
from torch import nn
from transformers.pytorch_utils import Conv1D

import fusetune
from fusetune import ops
from fusetune.integrations.peft import FusedLinear

LAYER = "base_model.model.transformer.h.0.mlp.c_fc"


def pair(dtype=torch.float32, **options):
    """(stock, fused, inputs) of a GPT-2 with LoRA on its eight Conv1D layers."""
    torch.manual_seed(0)
    model, inputs = tiny_models.gpt2()
    options = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, **options}
    stock = tiny_models.with_lora(model.to(dtype), **options)
    fused = copy.deepcopy(stock)
    report = fusetune.fuse(fused)
    assert report.stock == []
    return stock, fused, inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"use_dora": True}], ids=str)
def test_loss_and_gradients_are_pefts(dtype, options, calls):
    stock, fused, inputs = pair(dtype, **options)
    assert_near(step(fused, inputs), step(stock, inputs), step(float64_copy(stock), inputs))
    assert calls.count("dora_linear" if "use_dora" in options else "lora_linear") == 8


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows(rows, dtype, calls):
    """Few rows, of which torch takes some, and many: forward and the gradient of the input."""
    stock, fused, _ = pair(dtype)
    x = torch.randn(rows, 64).to(dtype)
    results = []
    for layer, values in (
        (fused.get_submodule(LAYER), x),
        (stock.get_submodule(LAYER), x),
        (copy.deepcopy(stock.get_submodule(LAYER)).double(), x.double()),
    ):
        leaf = values.clone().requires_grad_()
        y = layer(leaf)
        y.backward(torch.ones_like(y))
        results.append({"y": y.detach(), "dx": leaf.grad})
    assert_near(*results)
    assert calls == ["lora_linear"]


def test_the_weight_is_not_copied(monkeypatch, calls):
    """What the op gets is a view; nothing of the weight's size is made on the way."""
    _, fused, _ = pair()
    layer = fused.get_submodule(LAYER)
    given = []
    op = ops.lora_linear
    monkeypatch.setattr(ops, "lora_linear", lambda *a, **k: given.append(a[1]) or op(*a, **k))
    monkeypatch.setattr(torch.Tensor, "contiguous", guarded(torch.Tensor.contiguous, 64 * 256))
    layer(torch.randn(20, 64, requires_grad=True)).sum().backward()
    [weight] = given
    assert weight.data_ptr() == layer.base_layer.weight.data_ptr()
    assert weight.shape == (256, 64)


def guarded(function, size):
    def call(tensor, *args, **kwargs):
        assert tensor.numel() < size
        return function(tensor, *args, **kwargs)

    return call


def test_dropout_is_of_the_adapter_only(calls):
    """Dropping everything leaves the base layer, in value and gradient."""
    _, fused, _ = pair(lora_dropout=0.5)
    layer = fused.get_submodule(LAYER)
    layer.lora_dropout["default"].p = 1.0
    x = torch.randn(20, 64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    weight = layer.base_layer.weight
    torch.testing.assert_close(y, layer.base_layer(x))
    torch.testing.assert_close(x.grad, weight.sum(1).expand(20, 64))
    assert calls == ["lora_linear"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, calls):
    stock, fused, inputs = pair()
    with torch.autocast("cpu", dtype):
        got, eager = step(fused, inputs), step(stock, inputs)
    assert_near(got, eager, step(float64_copy(stock), inputs))
    assert calls.count("lora_linear") == 8


def test_merge_and_unload():
    stock, fused, inputs = pair()
    ids = {"input_ids": inputs["input_ids"]}
    expected = stock(**ids).logits
    for model in (stock, fused):
        model.merge_adapter()
    torch.testing.assert_close(fused(**ids).logits, expected)
    assert fusetune.fuse(fused).stock[0].reason == "the adapter is merged"
    fused.unmerge_adapter()
    torch.testing.assert_close(fused(**ids).logits, expected)
    with stock.disable_adapter(), fused.disable_adapter():
        torch.testing.assert_close(fused(**ids).logits, stock(**ids).logits)
    plain = fused.merge_and_unload()
    assert type(plain.transformer.h[0].mlp.c_fc) is Conv1D
    torch.testing.assert_close(plain(**ids).logits, expected)


def test_guards(calls):
    stock, fused, _ = pair()
    x = torch.randn(3, 64)
    for model in (stock, fused):
        base = model.get_submodule(LAYER).base_layer
        base.register_forward_hook(lambda module, args, output: output * 2)
    assert torch.equal(fused.get_submodule(LAYER)(x), stock.get_submodule(LAYER)(x))
    assert calls == []
    [row] = fusetune.fuse(fused).stock
    assert row.reason == "base_layer has hooks"

    class Other(Conv1D):
        pass

    layer = fused.get_submodule(LAYER)
    layer.base_layer._forward_hooks.clear()
    layer.base_layer.__class__ = Other
    [row] = fusetune.fuse(fused).stock
    assert row.reason == "base_layer is a Other, not a plain Linear"


def test_fan_in_fan_out_over_a_linear_layer_says_nothing_of_its_forward(calls):
    """PEFT switches it off when it wraps nn.Linear; a layer made by hand keeps it, for merging."""
    config = LoraConfig(r=2, fan_in_fan_out=True, init_lora_weights=False)
    layer = lora.Linear(nn.Linear(6, 6), "default", config, r=2)
    layer.base_layer.weight.requires_grad_(False)
    assert layer.fan_in_fan_out
    x = torch.randn(4, 6)
    expected = layer(x)
    model = nn.Sequential(layer)
    assert fusetune.fuse(model).stock == []
    assert type(layer) is FusedLinear
    torch.testing.assert_close(layer(x), expected)
    assert calls == ["lora_linear"]


def test_dora_of_another_orientation_is_left_to_peft(calls):
    stock, fused, _ = pair(use_dora=True)
    x = torch.randn(3, 64)
    layer = fused.get_submodule(LAYER)
    layer.lora_magnitude_vector["default"].fan_in_fan_out = False
    with pytest.raises(RuntimeError, match="size"):  # PEFT's own
        layer(x)
    [row] = fusetune.fuse(fused).stock
    assert row.reason == "DoRA's fan_in_fan_out is not the base layer's"
    assert calls == []
    assert stock.get_submodule(LAYER)(x).shape == (3, 256)


def test_compiled(fresh_compiler, calls):
    _, fused, _ = pair()
    layer = fused.get_submodule(LAYER)
    x = torch.randn(12, 64)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    assert calls
