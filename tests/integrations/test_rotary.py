"""transformers' rotary embedding, fused: same numbers, and stock wherever it cannot be."""

import copy
import inspect
import pickle

import pytest
import tiny_models
import torch
from model_equality import assert_the_fused_step_is_the_stock_one

import fusetune
from fusetune.integrations import transformers_rotary
from fusetune.integrations.transformers_rotary import FusedRotary

METHOD = "rotary"
ATTENTION = "base_model.model.model.layers.0.self_attn"


def rows(report):
    return [row for row in report.rows if row.method == METHOD]


def test_same_step(calls):
    assert_the_fused_step_is_the_stock_one(METHOD, 2)
    assert calls.count("rotary") == 2


def test_alone_it_changes_no_number():
    stock, inputs = tiny_models.llama()
    fused = copy.deepcopy(stock)
    transformers_rotary.discover(fused)
    for module in fused.modules():
        if type(module) in transformers_rotary.SWAPS:
            module.__class__ = transformers_rotary.SWAPS[type(module)]
    got, want = (model(**inputs) for model in (fused, stock))
    assert torch.equal(got.logits, want.logits)
    for model, out in ((fused, got), (stock, want)):
        out.loss.backward()
        assert model.model.layers[0].self_attn.q_proj.weight.grad is not None
    for (name, a), b in zip(fused.named_parameters(), stock.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_signature_and_source_are_the_stock_class_s():
    model, _ = tiny_models.lora_llama()
    stock = type(model.get_submodule(ATTENTION))
    fusetune.fuse(model)
    attention = model.get_submodule(ATTENTION)
    assert inspect.signature(type(attention).forward) == inspect.signature(stock.forward)
    assert inspect.getsource(inspect.unwrap(type(attention).forward)) == inspect.getsource(
        inspect.unwrap(stock.forward)
    )


def test_an_argument_s_old_name_is_the_stock_forward_s(calls):
    model, _ = tiny_models.lora_llama()
    fusetune.fuse(model)
    attention = model.get_submodule(ATTENTION)
    tables = tuple(torch.randn(2, 1, 3, attention.head_dim))
    given = torch.randn(1, 3, attention.q_proj.in_features), tables, None
    want = attention(*given, cache=None)[0]
    assert calls.count("rotary") == 1
    torch.testing.assert_close(attention(*given, past_key_values=None)[0], want)
    assert calls.count("rotary") == 1


def turned_otherwise(q, k, cos, sin):
    """Neighbours against each other, as GPT-J does."""

    def turned(x):
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def test_another_function_is_none_of_ours(monkeypatch, calls):
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", turned_otherwise)
    monkeypatch.setattr(transformers_rotary, "SWAPS", {})
    monkeypatch.setattr(FusedRotary, "swaps", transformers_rotary.SWAPS)
    model, inputs = tiny_models.lora_llama()
    want = model(**inputs).logits
    assert not rows(fusetune.fuse(model))
    torch.testing.assert_close(model(**inputs).logits, want)
    assert "rotary" not in calls


@pytest.mark.parametrize("kind", ["float64", "a trained table", "other arguments", "a subclass"])
def test_stock_where_it_cannot_be_fused(kind, calls):
    def stock(q, k, cos, sin, unsqueeze_dim=1):
        seen.append(unsqueeze_dim)
        return q, k

    seen, options = [], {}
    q, k, cos, sin = torch.randn(2, 4, 3, 8), torch.randn(2, 1, 3, 8), *torch.randn(2, 2, 3, 8)
    turn = transformers_rotary._ours_or(stock)
    turn(q, k, cos, sin)
    assert not seen
    assert calls == ["rotary"]
    if kind == "float64":
        q, k, cos, sin = (t.double() for t in (q, k, cos, sin))
    if kind == "a trained table":
        cos.requires_grad_()
    if kind == "other arguments":
        options = {"unsqueeze_dim": 2}
    if kind == "a subclass":
        q = q.as_subclass(type("Mine", (torch.Tensor,), {}))
    turn(q, k, cos, sin, **options)
    assert seen == [options.get("unsqueeze_dim", 1)]
    assert calls == ["rotary"]


def test_a_module_that_was_cast_says_so():
    model, _ = tiny_models.llama()
    fusetune.fuse(model)
    model.model.layers[0].self_attn.double()
    (row,) = [r for r in rows(fusetune.fuse(model)) if r.module == "model.layers.0.self_attn"]
    assert "float64" in row.reason


def test_unfuse_copies_and_pickles():
    model, inputs = tiny_models.lora_llama()
    want = model(**inputs).logits
    fusetune.fuse(model)
    attention = copy.deepcopy(model).get_submodule(ATTENTION)
    assert isinstance(attention, FusedRotary)
    again = pickle.loads(pickle.dumps(attention))
    assert type(again) is type(attention)
    fusetune.unfuse(model)
    assert not any(isinstance(m, FusedRotary) for m in model.modules())
    assert torch.equal(model(**inputs).logits, want)
