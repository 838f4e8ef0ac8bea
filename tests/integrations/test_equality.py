"""A fused model computes what PEFT's computes: loss, logits and every gradient."""

import copy

import pytest
import tiny_models
import torch
from model_equality import assert_near, float64_copy, step

import fusetune

MODELS = ["llama", "bert", "gpt2", "t5", "vit"]


def assert_same(fused, stock, exact, inputs):
    """One step of each; errors are measured against the same model in float64."""
    exact_inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    assert_near(step(fused, inputs), step(stock, inputs), step(exact, exact_inputs))


@pytest.mark.parametrize("kind", MODELS)
def test_dense_model(kind, calls):
    model, inputs = getattr(tiny_models, kind)()
    stock = tiny_models.with_lora(model)
    fused = copy.deepcopy(stock)
    report = fusetune.fuse(fused)
    assert all(row.fused for row in report.rows)
    assert_same(fused, stock, float64_copy(stock), inputs)
    assert calls.count("lora_linear") == sum(r.method == "LoRA" for r in report.fused)


@pytest.mark.parametrize("kind", ["llama", "bert", "t5", "vit"])
def test_4bit_model(kind, calls):
    model, inputs = getattr(tiny_models, kind)()
    stock = tiny_models.with_lora(tiny_models.quantize(model))
    fused = copy.deepcopy(stock)
    report = fusetune.fuse(fused)
    assert report.fused
    assert_same(fused, stock, float64_copy(stock), inputs)
    assert calls.count("lora_linear") == sum(r.method.startswith("LoRA") for r in report.fused)


@pytest.mark.parametrize(
    "options",
    [
        {"quant_type": "fp4"},
        {"compress_statistics": False},
        {"quant_storage": torch.bfloat16},
        {"compute_dtype": torch.bfloat16},
        {"compute_dtype": None},
    ],
    ids=str,
)
def test_kinds_of_4bit_weight(options, calls):
    model, inputs = tiny_models.llama()
    stock = tiny_models.with_lora(tiny_models.quantize(model, **options))
    fused = copy.deepcopy(stock)
    fusetune.fuse(fused)
    assert_same(fused, stock, float64_copy(stock), inputs)
    assert calls.count("lora_linear") == 14


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", ["fp32", "base"])
def test_half_precision_base(dtype, four_bit, adapter_dtype, calls):
    stock, inputs = tiny_models.lora_llama(layers=1, dtype=dtype, four_bit=four_bit)
    if adapter_dtype == "base":
        for name, parameter in stock.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    fused = copy.deepcopy(stock)
    fusetune.fuse(fused)
    assert_same(fused, stock, float64_copy(stock), inputs)
    assert calls.count("lora_linear") == 7


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"r": 1},
        {"r": 3},
        {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"q_proj": 5}},
    ],
    ids=str,
)
@pytest.mark.parametrize("four_bit", [False, True])
def test_lora_options(options, four_bit, calls):
    model, inputs = tiny_models.bert()
    if four_bit:
        tiny_models.quantize(model)
    stock = tiny_models.with_lora(model, **options)
    fused = copy.deepcopy(stock)
    report = fusetune.fuse(fused)
    assert_same(fused, stock, float64_copy(stock), inputs)
    assert calls.count("lora_linear") == sum(r.method.startswith("LoRA") for r in report.fused) > 8


@pytest.mark.parametrize("four_bit", [False, True])
def test_inference_without_gradients(four_bit, calls):
    stock, inputs = tiny_models.lora_llama(four_bit=four_bit, lora_dropout=0.5)
    fused, exact = copy.deepcopy(stock).eval(), float64_copy(stock).eval()
    fusetune.fuse(fused)
    stock.eval()
    with torch.inference_mode():
        got = fused(**inputs).logits
        assert calls.count("lora_linear") == 14
        # bitsandbytes computes in bf16 here on a CPU that has AVX512-BF16: it is no yardstick.
        dense = copy.deepcopy(exact).float()(**inputs).logits
        assert_near({"": got}, {"": dense}, {"": exact(**inputs).logits})


def test_generation_equals_stock(calls):
    stock, inputs = tiny_models.lora_llama()
    fused = copy.deepcopy(stock)
    fusetune.fuse(fused)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = stock.eval().generate(input_ids=inputs["input_ids"], **options)
    assert torch.equal(fused.eval().generate(input_ids=inputs["input_ids"], **options), expected)
    assert calls.count("lora_linear") == 14 * 8


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (0, 64), (2, 3, 64), (2, 0, 64), (2, 2, 2, 64)])
def test_shapes_of_the_input(four_bit, shape, calls):
    stock, _ = tiny_models.lora_llama(layers=1, four_bit=four_bit)
    fused = copy.deepcopy(stock)
    fusetune.fuse(fused)
    x = torch.randn(shape)
    path = "base_model.model.model.layers.0.mlp.gate_proj"
    expected = stock.get_submodule(path)(x)
    got = fused.get_submodule(path)(x)
    assert calls == ["lora_linear"]
    torch.testing.assert_close(got, expected)


def test_wrong_input_is_refused_by_name():
    fused, _ = tiny_models.lora_llama(layers=1)
    fusetune.fuse(fused)
    layer = fused.get_submodule("base_model.model.model.layers.0.mlp.gate_proj")
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., 64\], got \[2, 63\]"):
        layer(torch.randn(2, 63))


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(four_bit, base, calls):
    stock, inputs = tiny_models.lora_llama(layers=1, four_bit=four_bit, dtype=base)
    fused, exact = copy.deepcopy(stock), float64_copy(stock)
    fusetune.fuse(fused)
    with torch.autocast("cpu", torch.bfloat16):
        got, eager = step(fused, inputs), step(stock, inputs)
    assert calls.count("lora_linear") == 7
    assert_near(got, eager, step(exact, inputs))


def test_autocast_gives_each_layer_the_stock_dtype():
    stock, _ = tiny_models.lora_llama(layers=1)
    stock4, _ = tiny_models.lora_llama(layers=1, four_bit=True)
    for model in (stock, stock4):
        layer = model.get_submodule("base_model.model.model.layers.0.mlp.gate_proj")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(2, 64, dtype=dtype)
            with torch.autocast("cpu", torch.bfloat16):
                expected = layer(x)
                with fusetune.fused(model):
                    got = layer(x)
            assert got.dtype == expected.dtype
