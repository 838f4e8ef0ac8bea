"""NF4Linear: the layer, and checkpoints to and from bitsandbytes."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from tolerance import assert_same
from torch import nn

from fusetune import ops
from fusetune.nn import NF4Linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"quant_type": "fp4", "double_quant": True}])
def test_from_linear_computes_the_quantised_layer(bias, options):
    linear = nn.Linear(70, 9, bias=bias)
    layer = NF4Linear.from_linear(linear, **options)
    x = torch.randn(2, 3, 70)
    dense = ops.dequantize_4bit(ops.quantize_4bit(linear.weight, **options))
    assert torch.equal(layer.dequantize(), dense)
    assert_same(layer(x), nn.functional.linear(x, dense, linear.bias))
    assert (layer.in_features, layer.out_features) == (70, 9)
    assert [name for name, _ in layer.named_parameters()] == (["bias"] if bias else [])


def test_bias_is_trained():
    layer = NF4Linear.from_linear(nn.Linear(64, 8))
    layer(torch.randn(5, 64)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((8,), 5.0))


@pytest.mark.parametrize("double_quant", [False, True])
def test_checkpoints_go_to_bitsandbytes_and_back(double_quant):
    linear = nn.Linear(64, 32)
    theirs = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compress_statistics=double_quant)
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu")
    layer = NF4Linear.from_linear(nn.Linear(64, 32), double_quant=double_quant)
    assert layer.state_dict().keys() == theirs.state_dict().keys()
    layer.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 64, requires_grad=True)  # without a gradient bitsandbytes repacks its weight
    assert_same(layer(x), theirs(x))
    state = layer.state_dict()
    stats = {k.removeprefix("weight."): v for k, v in state.items() if k.startswith("weight.")}
    theirs.weight = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
    assert_same(layer(x), theirs(x))


def test_a_checkpoint_that_does_not_fit_is_refused():
    layer = NF4Linear.from_linear(nn.Linear(64, 32))
    before = layer.weight
    with pytest.raises(RuntimeError, match=r"shape \[32, 128\] in the checkpoint, \[32, 64\]"):
        layer.load_state_dict(NF4Linear.from_linear(nn.Linear(128, 32)).state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        layer.load_state_dict({"bias": torch.zeros(32)})
    state = layer.state_dict() | {"weight": torch.zeros(5, 1, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match=r"packed .* must have shape"):
        layer.load_state_dict(state)
    assert layer.weight is before


def test_inside_a_model():
    model = nn.Sequential(NF4Linear.from_linear(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 2))
    x = torch.randn(3, 64)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    fresh = nn.Sequential(NF4Linear.from_linear(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 2))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    half = model.to(torch.bfloat16)
    assert half[0].weight.absmax.dtype == torch.float32
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_compiles_in_one_graph(fresh_compiler):
    layer = NF4Linear.from_linear(nn.Linear(64, 16), double_quant=True)
    x = torch.randn(4, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_bad_arguments():
    with pytest.raises(ValueError, match="weight must be a matrix"):
        NF4Linear(ops.quantize_4bit(torch.randn(64)))
    with pytest.raises(ValueError, match=r"bias must have shape \(8,\), got \(7,\)"):
        NF4Linear(ops.quantize_4bit(torch.randn(8, 64)), torch.zeros(7))
