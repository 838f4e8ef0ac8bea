"""LoRA on nn.MultiheadAttention stays PEFT's: what PEFT computes is not what it differentiates."""

import copy

import tiny_models
import torch
from torch import nn

import fusetune

PATH = "base_model.model.attention"
OUT = "base_layer.out_proj"


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def adapted(**options):
    """(base, model with LoRA, its wrapped attention)"""
    torch.manual_seed(0)
    base = Attention().double()
    model = tiny_models.with_lora(copy.deepcopy(base), target_modules=["attention"], **options)
    model = model.double()
    return base, model, model.get_submodule(PATH)


def test_peft_adds_the_adapter_of_the_output_projection_twice():
    """In the forward pass and in merging: once by itself, once by the wrapped out_proj's merge."""
    base, model, wrapped = adapted()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        got = model(x)
        inward = wrapped.get_delta_weight("default")
        outward = wrapped.base_layer.out_proj.get_delta_weight("default")
        base.attention.in_proj_weight += inward
        base.attention.out_proj.weight += outward
        once = base(x)
        base.attention.out_proj.weight += outward
        twice = base(x)
        torch.testing.assert_close(got, twice)
        assert (got - once).abs().max() > 0.1
        torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(x), twice)


def test_and_differentiates_it_once():
    _, model, wrapped = adapted()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    lora_B = wrapped.base_layer.out_proj.lora_B["default"].weight
    model(x).square().sum().backward()
    given, step = lora_B.grad[0, 0].item(), 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            lora_B[0, 0] += sign * step
            values.append(model(x).square().sum())
            lora_B[0, 0] -= sign * step
    true = ((values[0] - values[1]) / (2 * step)).item()
    assert abs(true) > 0.01
    assert abs(given - true / 2) < 1e-4 * abs(true)


def test_peft_applies_no_dropout_to_it():
    _, model, _ = adapted(lora_dropout=0.9)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    assert model.training
    torch.testing.assert_close(model(x), model(x))


def test_it_is_left_to_peft(calls):
    _, stock, _ = adapted()
    stock = stock.float()
    fused = copy.deepcopy(stock)
    report = fusetune.fuse(fused)
    reasons = {row.module: row.reason for row in report.stock}
    assert "out_proj's adapter twice" in reasons[PATH]
    x, results = torch.randn(2, 5, 16), []
    for model in (fused, stock):
        y = model(x)
        y.square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(grads) == 4
        results.append([y.detach(), *grads])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
    assert calls == []
    assert f"{PATH}.{OUT}" in reasons  # a LoRA layer that PEFT only merges, never calls
