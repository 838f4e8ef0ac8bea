"""Fused prefix tuning under gradient checkpointing of both kinds, where PEFT's own cannot run.

The truth is the step without checkpointing.
"""

import functools

import prefix_models
import pytest
import torch
from peft import PrefixTuningConfig

import fusetune
from fusetune.nn import _prefix_stack

MODELS = {
    "llama": prefix_models.llama,
    "llama-eager": functools.partial(prefix_models.llama, attn_implementation="eager"),
    "gpt2": prefix_models.gpt2,
    "mistral": prefix_models.mistral,
    "bert": functools.partial(prefix_models.encoder, "Bert", "TokenClassification"),
    "t5": prefix_models.t5,
    "bart": prefix_models.bart,
}


def enable(model, reentrant):
    model.base_model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train()


@pytest.fixture
def recomputed(monkeypatch):
    """Calls of the attention function within backward passes."""
    from fusetune.nn import _prefix_interface

    count = []
    for name in ("_fused", "joined"):
        function = getattr(_prefix_interface, name)

        def counting(*args, function=function, **kwargs):
            if torch._C._current_graph_task_id() != -1:
                count.append(args)
            return function(*args, **kwargs)

        monkeypatch.setattr(_prefix_interface, name, counting)
    return count


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("first", ["fuse", "checkpointing"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_step_is_that_without_checkpointing(name, reentrant, first, projection, recomputed):
    model, task = prefix_models.prefix_tuned(
        MODELS[name], prefix_projection=projection, encoder_hidden_size=16, scale=2.0
    )
    inputs = prefix_models.inputs(task, padding="left")
    expected = prefix_models.step(model.train(), inputs)
    if first == "checkpointing":
        enable(model, reentrant)
    fusetune.fuse(model)
    if first == "fuse":
        enable(model, reentrant)
    for _ in range(2):
        recomputed.clear()
        prefix_models.assert_equal_steps(prefix_models.step(model, inputs), expected)
        assert len(recomputed) == (2 if name == "bart" else 3)
    model.base_model.activation_checkpointing_disable()
    prefix_models.assert_equal_steps(prefix_models.step(model, inputs), expected)


def test_stock_cannot():
    """Were it able to, these tests should compare with it."""
    model, task = prefix_models.prefix_tuned(prefix_models.llama)
    enable(model, False)
    with pytest.raises(RuntimeError, match="must match the size"):
        prefix_models.step(model, prefix_models.inputs(task, padding="left"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_each_pass_is_recomputed_with_its_own_prefix(reentrant):
    """Two forward passes, with the adapter and without, before the backward pass of the first."""
    model, task = prefix_models.prefix_tuned(prefix_models.llama)
    model.add_adapter("other", PrefixTuningConfig(task_type=task, num_virtual_tokens=2))
    inputs = prefix_models.inputs(task)
    expected = prefix_models.step(model, inputs)
    fusetune.fuse(model)
    enable(model, reentrant)
    model.zero_grad()
    loss = model(**inputs).loss
    with torch.no_grad():
        model.base_model(**inputs)
        model.set_adapter("other")
        model(**inputs)
        model.set_adapter("default")
    loss.backward()
    name = "prompt_encoder.default.embedding.weight"
    grad = model.get_parameter(name).grad
    torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_adapters_by_row(reentrant):
    model, task = prefix_models.prefix_tuned(prefix_models.llama)
    config = PrefixTuningConfig(task_type=task, num_virtual_tokens=2)
    model.add_adapter("other", config)
    fusetune.fuse(model)
    for parameter in model.prompt_encoder.parameters():
        parameter.requires_grad_(True)
    inputs = prefix_models.inputs(task, padding="left")
    inputs["adapter_names"] = ["other", "default", "__base__"]
    expected = prefix_models.step(model.train(), inputs)
    assert len(expected) == 4
    enable(model, reentrant)
    prefix_models.assert_equal_steps(prefix_models.step(model, inputs), expected)


def test_adapters_can_be_added_meanwhile():
    model, task = prefix_models.prefix_tuned(prefix_models.llama)
    config = PrefixTuningConfig(task_type=task, num_virtual_tokens=2)
    fusetune.fuse(model)
    enable(model, False)
    model.add_adapter("other", config)
    assert all(layer.gradient_checkpointing for layer in model.base_model.model.layers)
    fusetune.unfuse(model)
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        model.add_adapter("third", config)


def test_leaves_are_for_reentrant_checkpoints_alone(monkeypatch):
    gates = []
    apply = _prefix_stack._Gate.apply
    monkeypatch.setattr(_prefix_stack._Gate, "apply", lambda *a: gates.append(a) or apply(*a))
    model, task = prefix_models.prefix_tuned(prefix_models.llama)
    fusetune.fuse(model)
    inputs = prefix_models.inputs(task)
    prefix_models.step(model, inputs)
    enable(model, False)
    prefix_models.step(model, inputs)
    assert not gates
    enable(model, True)
    prefix_models.step(model, inputs)
    assert len(gates) == 3
