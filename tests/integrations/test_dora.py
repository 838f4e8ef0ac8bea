"""PEFT's DoRA, fused: equal to PEFT's, and nothing else of the layer changes."""

import copy

import pytest
import tiny_models
import torch
from model_equality import assert_near, float64_copy, step
from peft.tuners.lora import dora

import fusetune
from fusetune import ops
from fusetune.reference.dropout import dropout, new_seed

LAYER = "base_model.model.model.layers.0.mlp.gate_proj"


def pair(*, four_bit=False, **options):
    """(stock, fused, inputs): a LLaMA with DoRA whose magnitudes are no longer the norms."""
    stock, inputs = tiny_models.lora_llama(layers=1, four_bit=four_bit, use_dora=True, **options)
    for name, parameter in stock.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data *= torch.rand_like(parameter) + 0.5
    fused = copy.deepcopy(stock)
    report = fusetune.fuse(fused)
    assert report.stock == []
    return stock, fused, inputs


@pytest.mark.parametrize("four_bit", [False, True])
def test_loss_and_gradients_are_pefts(four_bit, calls):
    stock, fused, inputs = pair(four_bit=four_bit)
    got, expected = step(fused, inputs), step(stock, inputs)
    assert calls.count("dora_linear") == 7
    assert any("lora_magnitude_vector" in name for name in got)
    assert abs(got["loss"] - expected["loss"]) <= 1e-6 * expected["loss"]
    for name, value in expected.items():
        assert (got[name] - value).norm() <= 1e-5 * value.norm(), name
    methods = {row.method for row in fusetune.fuse(fused).fused}
    assert ("DoRA 4-bit" if four_bit else "DoRA") in methods


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(dtype, four_bit, calls):
    stock, fused, inputs = pair(four_bit=four_bit, dtype=dtype)
    assert_near(step(fused, inputs), step(stock, inputs), step(float64_copy(stock), inputs))
    assert calls.count("dora_linear") == 7


@pytest.mark.parametrize("four_bit", [False, True])
def test_dropout_is_of_everything_that_dora_adds(four_bit, monkeypatch):
    """With PEFT's dropout replaced by the op's mask the results are the same; evaluated without."""
    stock, fused, _ = pair(four_bit=four_bit, lora_dropout=0.4)
    ours, theirs = fused.get_submodule(LAYER), stock.get_submodule(LAYER)
    x = torch.randn(6, 64, requires_grad=True)
    torch.manual_seed(3)
    got = ours(x)
    torch.manual_seed(3)
    seed = new_seed(x.device)
    drop = theirs.lora_dropout["default"]
    monkeypatch.setattr(drop, "forward", lambda x: dropout(x, 0.4, seed))
    expected = theirs(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    [dx] = torch.autograd.grad(got.square().sum(), x)
    [true] = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(dx, true, rtol=1e-4, atol=1e-4)
    ours.eval(), theirs.eval()
    ours.lora_dropout.train()  # PEFT asks the layer, not its dropout
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*[mM]erge lora module to 4-bit")
@pytest.mark.parametrize("four_bit", [False, True])
def test_state_dict_merging_and_disabling(four_bit, calls):
    stock, fused, _ = pair(four_bit=four_bit)
    assert list(fused.state_dict()) == list(stock.state_dict())
    x = torch.randn(3, 64, requires_grad=True)
    ours, theirs = fused.get_submodule(LAYER), stock.get_submodule(LAYER)

    def same():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)

    with fused.disable_adapter(), stock.disable_adapter():
        same()
    for model in (stock, fused):
        model.merge_adapter()
    same()
    for model in (stock, fused):
        model.unmerge_adapter()
    assert "dora_linear" not in calls
    same()
    assert "dora_linear" in calls
    fusetune.unfuse(fused)
    assert type(ours) is type(theirs)


def test_switched_on_caching_is_left_to_peft_in_evaluation(calls, monkeypatch):
    stock, fused, _ = pair()
    monkeypatch.setattr(dora, "ENABLE_DORA_CACHING", True)
    x = torch.randn(3, 64)
    fused.get_submodule(LAYER)(x)
    assert calls == ["dora_linear"]
    stock.eval(), fused.eval()
    assert torch.equal(fused.get_submodule(LAYER)(x), stock.get_submodule(LAYER)(x))
    assert calls == ["dora_linear"]
    rows = {row.module: row for row in fusetune.fuse(fused).rows}
    assert "cache of DoRA's norms" in rows[LAYER].reason


def test_without_a_kernel_peft_runs(calls, monkeypatch):
    stock, fused, _ = pair()
    for op in ops.OPS.values():
        monkeypatch.setattr(op, "impls", op.impls[-1:])
        monkeypatch.setattr(op, "_chosen", {})
        monkeypatch.setattr(op, "_names", {})
    with ops.use_backend("auto"):
        x = torch.randn(3, 64)
        assert torch.equal(fused.get_submodule(LAYER)(x), stock.get_submodule(LAYER)(x))
        assert calls == []
