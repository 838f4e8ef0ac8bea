"""LoraLinear against PEFT's layer: outputs, gradients, and state dicts that load both ways."""

import copy

import peft
import pytest
import torch
from tolerance import assert_same, one_thread
from torch import nn

from fusetune.nn import LoraLinear, NF4Linear


def peft_layer(linear, **options):
    model = nn.Sequential(copy.deepcopy(linear))
    config = peft.LoraConfig(target_modules=["0"], init_lora_weights=False, **options)
    return peft.get_peft_model(model, config).base_model.model[0]


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("m", [3, 60])
def test_equals_peft(m, lora_bias, use_rslora):
    linear = nn.Linear(70, 9)
    options = {"lora_alpha": 6, "use_rslora": use_rslora, "lora_bias": lora_bias}
    theirs = peft_layer(linear, r=4, **options)
    ours = LoraLinear.from_linear(linear, 4, **options)
    ours.load_state_dict(theirs.state_dict())  # strict: the keys are PEFT's
    x, dy = torch.randn(2, m, 70), torch.randn(2, m, 9)
    results = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(dy)
        grads = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
        results.append({"y": y.detach(), "dx": leaf.grad, **grads})
    assert results[0].keys() == results[1].keys()
    for name in results[0]:
        assert_same(results[0][name], results[1][name], name)
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("quantize", [False, True])
def test_starts_as_its_base_and_trains_the_adapter_only(quantize):
    linear = nn.Linear(64, 8)
    layer = LoraLinear.from_linear(linear, 4, quantize=quantize, lora_dropout=0.1)
    x = torch.randn(5, 64)
    assert torch.equal(layer(x).detach(), layer.eval()(x))  # B is zero: dropout changes nothing
    base = NF4Linear.from_linear(linear) if quantize else linear
    assert_same(layer(x), base(x))
    trained = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert trained == ["lora_A.default.weight", "lora_B.default.weight"]
    layer.train()(x).sum().backward()
    assert layer.lora_B["default"].weight.grad.abs().sum() > 0
    assert layer.base_layer.bias.grad is None


def test_masks_differ_between_modules_and_between_training_and_evaluation():
    one = LoraLinear.from_linear(nn.Linear(64, 8), 4, lora_dropout=0.5)
    nn.init.normal_(one.lora_B["default"].weight)
    other, x = copy.deepcopy(one), torch.randn(5, 64)
    assert not torch.equal(one(x), other(x))
    assert torch.equal(one.eval()(x), other.eval()(x))


def test_learns():
    """A few steps of training fit a low-rank change of the weight: the loss falls a hundredfold."""
    base = nn.Linear(16, 16)
    target = base.weight.detach() + torch.randn(16, 2) @ torch.randn(2, 16) / 4
    layer = LoraLinear.from_linear(base, 2, lora_alpha=2)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    losses = []
    with one_thread():
        for _ in range(150):
            x = torch.randn(64, 16)
            loss = (layer(x) - nn.functional.linear(x, target, base.bias)).square().mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[-1] < losses[0] / 100


@pytest.mark.parametrize("quantize", [False, True])
def test_compiles_in_one_graph(fresh_compiler, quantize):
    layer = LoraLinear.from_linear(nn.Linear(64, 16), 4, quantize=quantize)
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(4, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_bad_arguments():
    with pytest.raises(ValueError, match="r must be at least 1, got 0"):
        LoraLinear.from_linear(nn.Linear(4, 4), 0)
    with pytest.raises(ValueError, match="lora_dropout must be in"):
        LoraLinear.from_linear(nn.Linear(4, 4), 2, lora_dropout=1.0)
