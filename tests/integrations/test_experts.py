"""LoRA on the stacked weights of experts: tokens pass through the factors, no stack is folded."""

import copy

import pytest
import tiny_models
import torch
from expert_models import (
    CLASSES,
    EXPERTS,
    HIDDEN,
    IMPLEMENTATIONS,
    INNER,
    OP,
    WEIGHTS,
    adapted,
    double,
    exact,
    inputs,
    mixtral_config,
    pair,
    qwen2_moe_config,
    results,
)
from model_equality import assert_near, step
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralForCausalLM, Qwen2MoeForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import fusetune
from fusetune.integrations import peft_experts

# --- the numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", CLASSES)
def test_values_and_gradients_are_pefts(kind, implementation, dtype, calls):
    stock, fused = pair(kind, implementation, dtype)
    assert fusetune.fuse(fused).stock == []
    given = inputs(dtype=dtype)
    assert_near(results(fused, *given), results(stock, *given), double(stock, *given))
    assert calls.count(OP) == 2
    assert calls.count("glu") == (kind in ("mixtral", "qwen2_moe"))


@pytest.mark.parametrize("tokens", [0, 1, 40])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_numbers_of_tokens(implementation, tokens, calls):
    stock, fused = pair(implementation=implementation)
    given = inputs(tokens)
    if tokens:
        assert_near(results(fused, *given), results(stock, *given), double(stock, *given))
    else:
        assert fused(*given).shape == (0, HIDDEN)
    assert calls.count(OP) == 2


@pytest.mark.parametrize("weights", [WEIGHTS[:1], WEIGHTS[1:], WEIGHTS[::-1]], ids=str)
def test_one_weight_adapted_and_either_order(weights, calls):
    stock, fused = pair(weights=weights)
    given = inputs()
    assert_near(results(fused, *given), results(stock, *given), double(stock, *given))
    assert calls.count(OP) == len(weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CLASSES)
def test_by_torchs_grouped_products(kind, dtype, monkeypatch, calls):
    """What runs on a GPU and under torch.compile."""
    monkeypatch.setattr(peft_experts, "_composed", lambda x: True)
    stock, fused = pair(kind, dtype=dtype, r=3)
    given = inputs(dtype=dtype)
    assert_near(results(fused, *given), results(stock, *given), double(stock, *given))
    assert OP not in calls
    assert fusetune.fuse(fused).rows[0].backend == "torch"


def test_sizes_that_torchs_grouped_product_refuses(monkeypatch, calls):
    monkeypatch.setattr(peft_experts, "_composed", lambda x: True)
    monkeypatch.setitem(CLASSES, "odd", (MixtralExperts, lambda: mixtral_config(inner=20)))
    stock, fused = pair("odd", "eager")
    given = inputs()
    assert torch.equal(fused(*given), stock(*given))
    assert "multiples of 8" in fusetune.fuse(fused).stock[0].reason
    assert calls == []


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_models(kind, implementation, calls):
    torch.manual_seed(0)
    made = {"mixtral": mixtral_config, "qwen2_moe": qwen2_moe_config}[kind]()
    model = (MixtralForCausalLM if kind == "mixtral" else Qwen2MoeForCausalLM)(made)
    model.set_experts_implementation(implementation)
    stock = adapted(model, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    fused = copy.deepcopy(stock)
    report = fusetune.fuse(fused)
    assert [r.method for r in report.fused].count("LoRA experts") == 1
    given = tiny_models.token_inputs()
    assert_near(step(fused, given), step(stock, given), step(exact(stock), given))
    assert calls.count(OP) == 2


def test_experts_without_tokens_have_zero_gradients():
    stock, fused = pair()
    x, index, weights = inputs()
    index = torch.tensor([[0, 2]] * len(x))
    got, eager = results(fused, x, index, weights), results(stock, x, index, weights)
    assert_near(got, eager, double(stock, x, index, weights))
    [gradient] = [g for n, g in got.items() if "base_layer" not in n and "lora_A" in n]
    by_expert = gradient.view(EXPERTS, -1)
    assert by_expert[[0, 2]].any(1).all()
    assert not by_expert[[1, 3]].any()


# --- D6 -------------------------------------------------------------------------------------------


class Folds(TorchDispatchMode):
    """Counts products that make something of a whole stack's size."""

    def __init__(self, size):
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.baddbmm.default, torch.ops.aten.bmm.default):
            self.count += out.numel() >= self.size
        return out


def test_d6_peft_folds_every_stack_twice_and_we_never_do(monkeypatch):
    monkeypatch.setattr(peft_experts, "_composed", lambda x: True)  # what the dispatcher can see
    stock, fused = pair(implementation="eager")
    counts = []
    for model in (stock, fused):
        with Folds(EXPERTS * HIDDEN * INNER) as folds, torch.no_grad():
            model(*inputs(1))
        counts.append(folds.count)
    assert counts == [4, 0]


def test_no_tensor_of_a_stacks_size_is_made(monkeypatch, calls):
    """Of one token's experts, only their own weights are read."""
    _, fused = pair(implementation="eager")
    size = EXPERTS * HIDDEN * INNER
    empty = torch.empty

    def small(*args, **kwargs):
        out = empty(*args, **kwargs)
        assert out.numel() < size
        return out

    monkeypatch.setattr(torch, "empty", small)
    results(fused, *inputs(1))
    assert calls.count(OP) == 2
