"""Fused prefix tuning under torch.compile: one graph, and the step that stock PEFT makes."""

import functools

import prefix_models
import pytest
import torch
from peft import PrefixTuningConfig
from torch._dynamo import lookup_backend

import fusetune

MODELS = {
    "llama": prefix_models.llama,
    "gpt2": prefix_models.gpt2,  # of which stock PEFT has several graphs
    "bert": functools.partial(prefix_models.encoder, "Bert", "TokenClassification"),
    "t5": prefix_models.t5,
}
pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compiled(model, graphs):
    """fullgraph: anything that would break the graph raises."""

    def backend(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    return torch.compile(model, backend=backend, fullgraph=True)


def fused_calls(graph):
    return sum("prefix_attention" in str(node.target) for node in graph.graph.nodes)


def step(model, inputs):
    made = prefix_models.step(model, inputs)
    return {name.removeprefix("_orig_mod."): value for name, value in made.items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_one_graph(name):
    model, task = prefix_models.prefix_tuned(MODELS[name])
    inputs = prefix_models.inputs(task, padding="left")
    expected = step(model, inputs)
    fusetune.fuse(model)
    graphs = []
    prefix_models.assert_equal_steps(step(compiled(model, graphs), inputs), expected)
    assert [fused_calls(graph) for graph in graphs] == [3]


def test_what_is_active_is_looked_at_again():
    """Adapters of two lengths in turn, mixed in a batch, and none."""
    small = functools.partial(prefix_models.llama, num_hidden_layers=1)
    model, task = prefix_models.prefix_tuned(small)
    model.add_adapter("other", PrefixTuningConfig(task_type=task, num_virtual_tokens=2))
    fusetune.fuse(model)
    for parameter in model.prompt_encoder.parameters():
        parameter.requires_grad_(True)
    inputs = prefix_models.inputs(task)
    by_row = {**inputs, "adapter_names": ["other", "__base__", "default"]}
    graphs = []
    other = compiled(model, graphs)
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        prefix_models.assert_equal_steps(step(other, inputs), step(model, inputs))
    for parameter in model.prompt_encoder.parameters():
        parameter.requires_grad_(True)
    prefix_models.assert_equal_steps(step(other, by_row), step(model, by_row))
    assert {fused_calls(graph) for graph in graphs} == {1}
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(other(**inputs).logits, model(**inputs).logits)
    assert fused_calls(graphs[-1]) == 0
