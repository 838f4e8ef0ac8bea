"""A model's own frozen linear layers, fused: same numbers, and stock wherever they cannot be."""

import copy

import pytest
import tiny_models
import torch
from model_equality import assert_near, float64_copy, step

import fusetune
from fusetune.integrations.linear import FusedLinear

ROW = "frozen linear"


def rows(report):
    return [row for row in report.rows if row.method == ROW]


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_same_step(kind, calls):
    model, inputs = getattr(tiny_models, kind)()
    stock = tiny_models.with_lora(model)
    fused = copy.deepcopy(stock)
    report = fusetune.fuse(fused)
    exact = float64_copy(stock)
    exact_inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    assert_near(step(fused, inputs), step(stock, inputs), step(exact, exact_inputs))
    assert all(row.fused for row in rows(report))
    assert calls.count("linear") >= len(rows(report)) > 0


def test_layers_inside_an_adapter_stay_stock():
    stock, _ = tiny_models.lora_llama()
    fusetune.fuse(stock)
    names = [name for name, m in stock.named_modules() if type(m) is FusedLinear]
    assert names == ["base_model.model.lm_head"]


def test_an_adapter_added_later(calls):
    from peft import LoraConfig

    model, inputs = tiny_models.lora_llama()
    fusetune.fuse(model)
    model.add_adapter("head", LoraConfig(r=2, target_modules=["lm_head"]))
    model.set_adapter("head")
    report = fusetune.fuse(model)
    assert not rows(report)
    assert any(
        "lm_head" in row.module and row.method == "LoRA" and row.fused for row in report.rows
    )
    model(**inputs).loss.backward()
    assert "linear" not in calls


def test_stock_while_trained_or_of_another_dtype(calls):
    model, inputs = tiny_models.lora_llama()
    expected = model(**inputs).logits
    fusetune.fuse(model)
    head = model.base_model.model.lm_head
    head.weight.requires_grad_(True)
    assert "the weight is trained" in rows(fusetune.fuse(model))[0].reason
    logits = model(**inputs).logits
    torch.testing.assert_close(logits, expected)
    assert "linear" not in calls
    logits.sum().backward()
    assert head.weight.grad is not None
    head.requires_grad_(False).to(torch.bfloat16)
    hidden = torch.randn(2, head.in_features, dtype=torch.bfloat16)
    assert torch.equal(head(hidden), torch.nn.functional.linear(hidden, head.weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert head(hidden.float()).dtype == torch.bfloat16


def test_trained_bias():
    torch.manual_seed(0)
    stock = torch.nn.Sequential(torch.nn.Linear(20, 12), torch.nn.Linear(12, 3))
    for layer in stock:
        layer.weight.requires_grad_(False)
    fused = copy.deepcopy(stock)
    assert len(rows(fusetune.fuse(fused))) == 2
    x = torch.randn(150, 20)
    for model in (stock, fused):
        model(x).square().sum().backward()
    for a, b in zip(fused, stock, strict=True):
        torch.testing.assert_close(a.bias.grad, b.bias.grad)


def test_unfuse_and_copies():
    model, inputs = tiny_models.lora_llama()
    fusetune.fuse(model)
    copied = copy.deepcopy(model)
    assert type(copied.base_model.model.lm_head) is FusedLinear
    fusetune.unfuse(model)
    assert not any(type(m) is FusedLinear for m in model.modules())
    torch.testing.assert_close(copied(**inputs).logits, model(**inputs).logits)


def test_wrong_input_is_torchs_error():
    model, _ = tiny_models.lora_llama()
    fusetune.fuse(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model.base_model.model.lm_head(torch.randn(2, 5))


def test_not_met_outside_cpus_fp32():
    layer = torch.nn.Linear(8, 8).requires_grad_(False)
    assert FusedLinear.accepts(layer)
    assert not FusedLinear.accepts(copy.deepcopy(layer).to(torch.bfloat16))
    assert not FusedLinear.accepts(copy.deepcopy(layer).to("meta"))
    assert not FusedLinear.accepts(copy.deepcopy(layer).requires_grad_(True))
