"""Generation by a fused prefix-tuned model is greedily equal to the stock one's."""

import functools

import prefix_models
import pytest
import torch
from peft import PrefixTuningConfig

import fusetune

MODELS = {
    "llama": prefix_models.llama,
    "llama-eager": functools.partial(prefix_models.llama, attn_implementation="eager"),
    "qwen3": prefix_models.qwen3,
    "mistral": prefix_models.mistral,
    "gemma2": prefix_models.gemma2,
    "gemma3": prefix_models.gemma3,
    "gpt2": prefix_models.gpt2,
    "opt": prefix_models.opt,
    "t5": functools.partial(prefix_models.t5, initializer_factor=1.5),
    "bart": prefix_models.bart,
}


def prompts(task, padding="left"):
    given = prefix_models.inputs(task, padding=padding)
    del given["labels"]
    return given


def generated(model, inputs, **options):
    """(tokens, [scores of each step])."""
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    out = model.eval().generate(
        **inputs, output_scores=True, return_dict_in_generate=True, **options
    )
    return out.sequences, out.scores


def assert_same(got, expected):
    assert torch.equal(got[0], expected[0])
    for a, b in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_the_stock_ones(name, padding, beams):
    model, task = prefix_models.prefix_tuned(MODELS[name])
    inputs = prompts(task, padding)
    expected = generated(model, inputs, num_beams=beams)
    with fusetune.fused(model):
        assert_same(generated(model, inputs, num_beams=beams), expected)
        with model.disable_adapter():
            base = generated(model, inputs, num_beams=beams)
    assert not torch.allclose(base[1][0], expected[1][0])
    assert_same(generated(model.base_model, inputs, num_beams=beams), base)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("name", MODELS)
def test_without_a_cache_and_with_a_static_one(name, options):
    """Stock crashes here, or gives other tokens than with its own cache: that one is the truth."""
    model, task = prefix_models.prefix_tuned(MODELS[name])
    inputs = prompts(task)
    expected = generated(model, inputs)
    with fusetune.fused(model):
        assert_same(generated(model, inputs, **options), expected)


def test_a_prompt_in_parts():
    """A cache of a forward pass holds the tokens, and the next pass goes on from it."""
    model, task = prefix_models.prefix_tuned(prefix_models.llama)
    inputs = prompts(task, None)
    fusetune.fuse(model.eval())
    whole = model(**inputs).logits
    from transformers import DynamicCache

    cache = DynamicCache(config=model.base_model.config)
    from fusetune.integrations.peft_prompts import _prefix
    from fusetune.nn import prefix_attention

    prefix = _prefix(model, None, False)
    with prefix_attention.active(model.base_model, prefix):
        parts = [
            model.base_model(inputs["input_ids"][:, part], past_key_values=cache).logits
            for part in (slice(0, 7), slice(7, 8), slice(8, 12))
        ]
    assert cache.get_seq_length() == 12
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "llama-eager", "gpt2", "gemma3", "t5", "bart"])
def test_an_adapter_for_each_row(name, beams):
    model, task = prefix_models.prefix_tuned(MODELS[name])
    model.add_adapter("short", PrefixTuningConfig(task_type=task, num_virtual_tokens=2))
    names = ["short", "__base__", "default"]
    inputs = prompts(task)
    expected = []
    for row, adapter in enumerate(names):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        if adapter == "__base__":
            with model.disable_adapter():
                expected.append(generated(model, one, num_beams=beams)[0])
        else:
            model.set_adapter(adapter)
            expected.append(generated(model, one, num_beams=beams)[0])
    with fusetune.fused(model):
        got = generated(model, inputs, num_beams=beams, adapter_names=names)[0]
    assert torch.equal(got, torch.cat(expected))
