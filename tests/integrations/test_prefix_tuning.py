"""PEFT's prefix tuning, fused, makes the same step as the stock one."""

import copy
import functools

import prefix_models
import pytest
import torch

import fusetune
from fusetune.nn import _prefix_interface

CAUSAL = {
    "llama": prefix_models.llama,
    "qwen3": prefix_models.qwen3,
    "mistral-window": prefix_models.mistral,
    "mistral-narrow-window": functools.partial(prefix_models.mistral, window=3),
    "gemma3": prefix_models.gemma3,
    "gpt2": prefix_models.gpt2,
    "opt": prefix_models.opt,
}
HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "Model")
ENCODERS = {
    f"bert-{kind}": functools.partial(prefix_models.encoder, "Bert", kind) for kind in HEADS
}
ENCODERS["roberta-sequences"] = functools.partial(prefix_models.encoder, "Roberta", HEADS[0])
SEQ2SEQ = {"t5": prefix_models.t5, "bart": prefix_models.bart}
MODELS = {**CAUSAL, **ENCODERS, **SEQ2SEQ}


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of each call of the op by an attention function."""
    made = []
    op = _prefix_interface.prefix_attention

    def counting(*args, **kwargs):
        made.append(kwargs)
        return op(*args, **kwargs)

    monkeypatch.setattr(_prefix_interface, "prefix_attention", counting)
    return made


def row(model, **options):
    rows = fusetune.fuse(model, **options).rows
    [found] = [row for row in rows if row.method == "prefix tuning"]
    return found


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_the_step_is_the_stock_one(name, padding, calls):
    model, task = prefix_models.prefix_tuned(MODELS[name])
    inputs = prefix_models.inputs(task, padding=padding)
    expected = prefix_models.step(model, inputs)
    exact = prefix_models.step(copy.deepcopy(model).double(), inputs)
    assert row(model).fused
    base = prefix_models.loss_of(model.base_model(**inputs))
    assert (base - expected["loss"]).abs() > 1e-4 * base
    assert not calls
    got = prefix_models.step(model, inputs)
    # Against PEFT's in float64: its own rounding comes to as much as what is allowed.
    expected["loss"] = exact["loss"].to(got["loss"].dtype)
    prefix_models.assert_equal_steps(got, expected)
    assert len(calls) == (2 if name == "bart" else 3)


def test_windows_are_the_op_s_where_they_matter(calls):
    model, task = prefix_models.prefix_tuned(functools.partial(prefix_models.mistral, window=17))
    fusetune.fuse(model)
    prefix_models.step(model, prefix_models.inputs(task, length=12))
    prefix_models.step(model, prefix_models.inputs(task, length=13))
    assert [call["window"] for call in calls] == [None] * 3 + [17] * 3


def test_a_window_narrower_than_the_prefix():
    make = functools.partial(prefix_models.gemma3, sliding_window=4)
    model, task = prefix_models.prefix_tuned(make, num_virtual_tokens=7)
    inputs = prefix_models.inputs(task, padding="left")
    expected = prefix_models.step(model, inputs)
    with fusetune.fused(model):
        prefix_models.assert_equal_steps(prefix_models.step(model, inputs), expected)


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", [*CAUSAL, "bert-TokenClassification", *SEQ2SEQ, "gemma2"])
def test_eager_attention_gets_keys_and_values_joined(name, padding, calls):
    make = {**MODELS, "gemma2": prefix_models.gemma2}[name]
    model, task = prefix_models.prefix_tuned(functools.partial(make, attn_implementation="eager"))
    inputs = prefix_models.inputs(task, padding=padding)
    expected = prefix_models.step(model, inputs)
    assert row(model).reason.startswith("eager attention gives no log-sum-exp")
    prefix_models.assert_equal_steps(prefix_models.step(model, inputs), expected)
    assert not calls


def test_attentions_are_those_of_the_joined_keys():
    make = functools.partial(prefix_models.llama, attn_implementation="eager")
    model, task = prefix_models.prefix_tuned(make)
    inputs = prefix_models.inputs(task, padding="left")
    expected = model(**inputs, output_attentions=True).attentions
    with fusetune.fused(model):
        got = model(**inputs, output_attentions=True).attentions
    for a, b in zip(got, expected, strict=True):
        assert a.shape == (3, 4, 12, 12 + prefix_models.P)
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-SequenceClassification", "t5"])
def test_attention_dropout_takes_the_stock_random_stream(name, implementation, calls):
    rates = {
        "gpt2": {"attn_pdrop": 0.3},
        "bert-SequenceClassification": {"attention_probs_dropout_prob": 0.3},
        "t5": {"dropout_rate": 0.3},
    }
    options = rates.get(name, {"attention_dropout": 0.3})
    make = functools.partial(MODELS[name], attn_implementation=implementation, **options)
    model, task = prefix_models.prefix_tuned(make)
    model.train()
    inputs = prefix_models.inputs(task, padding="left")
    torch.manual_seed(1)
    expected = prefix_models.step(model, inputs)
    reason = row(model, dropout=False).reason
    assert reason.startswith("attention dropout" if implementation == "sdpa" else "eager")
    torch.manual_seed(1)
    prefix_models.assert_equal_steps(prefix_models.step(model, inputs), expected)
    assert not calls
    model.eval()
    assert row(model).fused == (implementation == "sdpa")


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_projection(name, projection):
    model, task = prefix_models.prefix_tuned(
        MODELS[name], prefix_projection=projection, encoder_hidden_size=16, scale=2.0
    )
    inputs = prefix_models.inputs(task)
    expected = prefix_models.step(model, inputs)
    assert len(expected) == (7 if projection else 3)
    with fusetune.fused(model):
        prefix_models.assert_equal_steps(prefix_models.step(model, inputs), expected)


def test_hooks_on_the_encoder_are_called():
    model, task = prefix_models.prefix_tuned(prefix_models.llama)
    encoder = model.prompt_encoder["default"]
    encoder.register_forward_hook(lambda module, args, out: 2 * out)
    inputs = prefix_models.inputs(task)
    expected = prefix_models.step(model, inputs)
    with fusetune.fused(model):
        prefix_models.assert_equal_steps(prefix_models.step(model, inputs), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-SequenceClassification"])
def test_positions_of_the_caller_are_moved(name):
    model, task = prefix_models.prefix_tuned(MODELS[name])
    inputs = prefix_models.inputs(task)
    inputs["position_ids"] = torch.arange(12).flip(0).expand(3, -1) + 2
    expected = prefix_models.step(model, inputs)
    with fusetune.fused(model):
        prefix_models.assert_equal_steps(prefix_models.step(model, inputs), expected)


def test_embeddings_instead_of_tokens():
    model, task = prefix_models.prefix_tuned(prefix_models.llama)
    inputs = prefix_models.inputs(task, padding="right")
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    expected = prefix_models.step(model, inputs)
    with fusetune.fused(model):
        prefix_models.assert_equal_steps(prefix_models.step(model, inputs), expected)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_bfloat16_rounds_no_more_than_stock(name):
    """Against the model in float64: at most twice the error that stock's rounding makes."""
    model, task = prefix_models.prefix_tuned(MODELS[name], dtype=torch.bfloat16)
    inputs = prefix_models.inputs(task, padding="left")
    stock = prefix_models.step(model, inputs)
    with fusetune.fused(model):
        got = prefix_models.step(model, inputs)
    model.double()
    exact = prefix_models.step(model, inputs)

    def error(result, name):
        return (result[name].double() - exact[name]).norm() / exact[name].norm()

    for key in exact:
        assert got[key].dtype == stock[key].dtype
        assert error(got, key) <= 2 * error(stock, key) + 2**-8, key


def test_autocast():
    model, task = prefix_models.prefix_tuned(prefix_models.llama)
    inputs = prefix_models.inputs(task, padding="left")
    exact = prefix_models.step(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        stock = prefix_models.step(model, inputs)
        with fusetune.fused(model):
            got = prefix_models.step(model, inputs)
    for key, value in exact.items():
        allowed = 2 * (stock[key] - value).norm() + 2**-8 * value.norm()
        assert (got[key] - value).norm() <= allowed, key


def test_float64(calls):
    model, task = prefix_models.prefix_tuned(prefix_models.llama, dtype=torch.float64)
    inputs = prefix_models.inputs(task, padding="left")
    expected = prefix_models.step(model, inputs)
    with fusetune.fused(model, loss=False):
        got = prefix_models.step(model, inputs)
    assert len(calls) == 3
    prefix_models.assert_equal_steps(got, expected, gradient=1e-7)  # the loss is fp32
