"""fuse and unfuse of prefix tuning leave no trace, and copies stand on their own."""

import copy
import functools
import gc
import weakref

import prefix_models
import pytest
import torch
from peft import PeftModelForCausalLM, PrefixTuningConfig, get_peft_model

import fusetune
from fusetune.nn import prefix_attention


def state(model):
    """Everything the modules and their configurations know, and who they are."""
    known = {}
    for name, module in model.named_modules():
        known[name] = (type(module), dict(module.__dict__))
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            known[name, kind] = list(getattr(module, kind).items())
            known[name, kind, "kwargs"] = list(getattr(module, f"{kind}_with_kwargs").items())
        if hasattr(module, "config"):
            known[name, "attention"] = module.config._attn_implementation
    return known


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [prefix_models.llama, prefix_models.t5, prefix_models.bart])
def test_unfuse_restores_everything(make, implementation):
    make = functools.partial(make, attn_implementation=implementation)
    model, task = prefix_models.prefix_tuned(make)
    inputs = prefix_models.inputs(task)
    before = state(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    fusetune.fuse(model)
    names = {m.config._attn_implementation for m in model.base_model.modules() if has_heads(m)}
    assert names == {f"prefix_{implementation}"}
    with torch.no_grad():
        model(**inputs)
    assert list(model.state_dict()) == list(weights)
    fusetune.unfuse(model)
    after = state(model)
    for name in before:
        assert after[name] == before[name], name
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def has_heads(module):
    return hasattr(module, "layer_idx") and hasattr(module, "config")


def test_with_fused_and_errors_within():
    model, _ = prefix_models.prefix_tuned(prefix_models.llama)
    before = state(model)
    with pytest.raises(KeyError), fusetune.fused(model):
        raise KeyError(type(model))
    assert type(model) is PeftModelForCausalLM
    assert state(model) == before
    fusetune.fuse(model)
    with fusetune.fused(model):
        fusetune.unfuse(model)
    assert prefix_attention.attached(model.base_model)
    assert not fusetune.fuse(model).stock


def test_fuse_is_idempotent():
    model, _ = prefix_models.prefix_tuned(prefix_models.llama)
    first = fusetune.fuse(model)
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    assert fusetune.fuse(model).rows == first.rows
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert "prefix tuning" in str(first)


def test_a_failed_pass_leaves_no_prefix_behind():
    for make in (prefix_models.llama, prefix_models.opt):
        model, task = prefix_models.prefix_tuned(make)
        inputs = prefix_models.inputs(task)
        expected = model.base_model(**inputs).loss
        fusetune.fuse(model)
        with pytest.raises(IndexError):
            model(input_ids=torch.full((2, 4), 999))
        torch.testing.assert_close(model.base_model(**inputs).loss, expected)


def test_deepcopy_is_independent():
    model, task = prefix_models.prefix_tuned(prefix_models.opt)
    inputs = prefix_models.inputs(task, padding="left")
    fusetune.fuse(model)
    expected = model(**inputs).loss.detach()
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    fusetune.unfuse(model)
    torch.testing.assert_close(clone(**inputs).loss.detach(), expected)
    assert clone.fused_reason() is None
    fusetune.unfuse(clone)
    torch.testing.assert_close(clone(**inputs).loss.detach(), expected)
    reference = weakref.ref(clone.base_model)
    del clone
    gc.collect()
    assert reference() is None


def test_an_attention_function_set_anew_is_seen():
    model, task = prefix_models.prefix_tuned(prefix_models.llama)
    inputs = prefix_models.inputs(task)
    expected = model(**inputs).loss
    report = fusetune.fuse(model)
    model.base_model.set_attn_implementation("eager")
    [row] = report.refresh().stock
    assert row.reason == "the attention function was changed since: call fuse() again"
    torch.testing.assert_close(model(**inputs).loss, expected)
    with pytest.raises(ValueError, match="adapter_names: this model runs PEFT's"):
        model(**inputs, adapter_names=["default"] * 3)
    [row] = fusetune.fuse(model).stock
    assert row.reason.startswith("eager attention")
    torch.testing.assert_close(model(**inputs).loss, expected)


def test_a_model_outside_the_interface_runs_as_ever():
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    base = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4))
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(base, config)
    inputs = prefix_models.inputs("CAUSAL_LM", padding="left")
    expected = prefix_models.step(model, inputs)
    row = next(row for row in fusetune.fuse(model).rows if row.method == "prefix tuning")
    assert "does not take its attention from AttentionInterface" in row.reason
    prefix_models.assert_equal_steps(prefix_models.step(model, inputs), expected)


def test_attach_refuses_by_name():
    with pytest.raises(ValueError, match="model: Linear is not a transformers model"):
        prefix_attention.attach(torch.nn.Linear(2, 2))


def test_replicas_of_data_parallel():
    """Replicas as torch.nn.DataParallel makes them: shallow copies with modules of their own."""
    model, task = prefix_models.prefix_tuned(prefix_models.llama)
    inputs = prefix_models.inputs(task)
    expected = model(**inputs).logits
    fusetune.fuse(model)

    def replica(module):
        copied = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            copied._modules[name] = None if child is None else replica(child)
        for name, parameter in module._parameters.items():
            copied._parameters[name] = parameter
        return copied

    for copied in (replica(model), replica(model)):
        torch.testing.assert_close(copied(**inputs).logits, expected)
