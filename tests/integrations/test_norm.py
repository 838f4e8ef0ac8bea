"""transformers' RMS norms, fused: same numbers, and stock wherever they cannot be."""

import copy
import pickle

import pytest
import tiny_models
import torch
from model_equality import assert_the_fused_step_is_the_stock_one

import fusetune
from fusetune.integrations.transformers_norm import FusedRMSNorm

METHOD = "rms norm"
NORM = "base_model.model.model.norm"


def rows(report):
    return [row for row in report.rows if row.method == METHOD]


def test_same_step(calls):
    assert_the_fused_step_is_the_stock_one(METHOD, 2 * 2 + 1)
    assert calls.count("rms_norm") == 5


def test_other_norms_are_none_of_ours():
    model, _ = tiny_models.t5()  # its norm is written otherwise
    assert not rows(fusetune.fuse(tiny_models.with_lora(model)))


@pytest.mark.parametrize("kind", ["x in bf16", "weight in float64", "a subclass of Tensor"])
def test_stock_where_it_cannot_be_fused(kind, calls):
    model, _ = tiny_models.lora_llama()
    stock = copy.deepcopy(model).get_submodule(NORM)
    fusetune.fuse(model)
    norm = model.get_submodule(NORM)
    x = torch.randn(3, norm.weight.shape[0])
    if kind == "x in bf16":
        x = x.to(torch.bfloat16)
    if kind == "weight in float64":
        norm.double()
        stock.double()
        (row,) = [row for row in fusetune.fuse(model).rows if row.module == NORM]
        assert "float64" in row.reason
    if kind == "a subclass of Tensor":
        x = x.as_subclass(type("Mine", (torch.Tensor,), {}))
    assert torch.equal(norm(x), stock(x))
    assert "rms_norm" not in calls


def test_trained_weight(calls):
    stock, inputs = tiny_models.llama()
    fused = copy.deepcopy(stock)
    fusetune.fuse(fused)
    for model in (stock, fused):
        model(**inputs).loss.backward()
    assert calls.count("rms_norm") == 5
    torch.testing.assert_close(fused.model.norm.weight.grad, stock.model.norm.weight.grad)


def test_unfuse_copies_and_pickles():
    model, inputs = tiny_models.lora_llama()
    want = model(**inputs).logits
    fusetune.fuse(model)
    norm = copy.deepcopy(model).get_submodule(NORM)
    assert isinstance(norm, FusedRMSNorm)
    again = pickle.loads(pickle.dumps(norm))
    assert type(again) is type(norm)
    fusetune.unfuse(model)
    assert not any(isinstance(m, FusedRMSNorm) for m in model.modules())
    assert torch.equal(model(**inputs).logits, want)
