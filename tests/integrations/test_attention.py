"""transformers' sdpa attention, fused: same numbers, and the stock function where it cannot be."""

import copy

import pytest
import tiny_models
import torch
from model_equality import assert_near, float64_copy, step

import fusetune
from fusetune.nn import fused_sdpa
from fusetune.ops import _base_attention_cpu

METHOD = "attention"


@pytest.fixture
def attended(monkeypatch):
    """What each call of the op was given besides tensors."""
    calls, op = [], fused_sdpa.attention

    def count(*tensors, **options):
        calls.append(options)
        return op(*tensors, **options)

    monkeypatch.setattr(fused_sdpa, "attention", count)
    return calls


def rows(report):
    return [row for row in report.rows if row.method == METHOD]


def llama(**options):
    return tiny_models.with_lora(tiny_models.llama(**options)[0]).train()


def mistral():
    from transformers import MistralConfig, MistralForCausalLM

    size = {"vocab_size": tiny_models.VOCABULARY, "hidden_size": 64, "intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "num_hidden_layers": 2}
    return tiny_models.with_lora(
        MistralForCausalLM(MistralConfig(**size, **heads, sliding_window=4))
    )


def inputs_padded(side):
    inputs = tiny_models.token_inputs()
    if side is not None:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1, slice(0, 4) if side == "left" else slice(8, None)] = 0
    return inputs


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("make", [llama, mistral])
def test_same_step(make, side, attended):
    stock, inputs = make(), inputs_padded(side)
    fused = copy.deepcopy(stock)
    report = fusetune.fuse(fused)
    assert [row.fused for row in rows(report)] == [True, True]
    assert_near(step(fused, inputs), step(stock, inputs), step(float64_copy(stock), inputs))
    assert len(attended) == 2
    assert all(options["is_causal"] == (options["attn_mask"] is None) for options in attended)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("side", [None, "left"])
def test_same_step_in_16_bits(side, dtype, attended, monkeypatch):
    monkeypatch.setattr(_base_attention_cpu, "_amx", lambda: False)  # bfloat16 is torch's there
    stock, inputs = llama().to(dtype), inputs_padded(side)
    fused = copy.deepcopy(stock)
    report = fusetune.fuse(fused)
    assert [row.fused for row in rows(report)] == [True, True]
    assert_near(step(fused, inputs), step(stock, inputs), step(float64_copy(stock), inputs))
    assert len(attended) == 2


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(cache, attended):
    stock, inputs = llama().eval(), inputs_padded("left")
    del inputs["labels"]
    fused = copy.deepcopy(stock)
    fusetune.fuse(fused)
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    results = [model.generate(**inputs, **options) for model in (fused, stock)]
    assert torch.equal(*results)
    assert len(attended) == 2  # the prompt's; a single query is the stock function's


@pytest.mark.parametrize(
    "kind", ["many keys", "one token", "16 bits on AMX", "a tensor of another kind"]
)
def test_the_stock_function_where_it_is_faster_or_must_be(kind, attended, monkeypatch):
    model, inputs = llama(), tiny_models.token_inputs()
    fusetune.fuse(model)
    if kind == "many keys":
        monkeypatch.setattr(_base_attention_cpu, "MOST_KEYS", 11)
    if kind == "one token":
        inputs = {"input_ids": inputs["input_ids"][:, :1]}
    if kind == "16 bits on AMX":
        monkeypatch.setattr(_base_attention_cpu, "_amx", lambda: True)
        model.to(torch.bfloat16)
        assert all("bfloat16" in row.reason for row in rows(fusetune.fuse(model)))
    if kind == "a tensor of another kind":
        inputs = {
            "inputs_embeds": torch.randn(2, 5, 64).as_subclass(type("Mine", (torch.Tensor,), {}))
        }
    model(**inputs)
    assert not attended


@pytest.mark.parametrize("kind", ["16 bits on AMX", "eager", "t5"])
def test_attention_that_is_none_of_ours(kind, monkeypatch):
    model = tiny_models.t5()[0] if kind == "t5" else tiny_models.llama()[0]
    if kind == "16 bits on AMX":
        monkeypatch.setattr(_base_attention_cpu, "_amx", lambda: True)
        model.to(torch.bfloat16)
    if kind == "eager":
        model.set_attn_implementation("eager")
    name = model.config._attn_implementation
    assert not rows(fusetune.fuse(model))
    assert model.config._attn_implementation == name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_4bit_layers(dtype, monkeypatch):
    """Their weights do not tell the dtype of activations, nor do LoRA's: the config does."""
    monkeypatch.setattr(_base_attention_cpu, "_amx", lambda: True)
    model, _ = tiny_models.lora_llama(four_bit=True, dtype=dtype)
    model.config.dtype = dtype
    assert len(rows(fusetune.fuse(model))) == (2 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, inputs = llama(), tiny_models.token_inputs()
    fusetune.fuse(model)
    want = step(model, inputs)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, value in step(model, inputs).items():
        torch.testing.assert_close(value, want[name], msg=name)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(attended):
    """Without a break of the graph: there it is the stock function, which torch knows."""
    model, inputs = llama().eval(), inputs_padded("left")
    fusetune.fuse(model)
    want = model(**inputs).logits
    attended.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, want)
    assert not attended
