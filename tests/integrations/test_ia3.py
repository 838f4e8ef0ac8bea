"""PEFT's IA3 under `fuse`: what stock PEFT computes, and what it leaves undone."""

import contextlib
import copy
import pickle

import bitsandbytes as bnb
import pytest
import tiny_models
import torch
from model_equality import assert_near, float64_copy, step
from peft import IA3Config, PeftModel, get_peft_model
from peft.tuners.ia3 import Linear
from peft.tuners.ia3.bnb import Linear4bit

import fusetune

TARGETS = {  # model: (target_modules, those that are feed-forward), as PEFT has them by default
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "t5": (["k", "v", "wo"], ["wo"]),
    "vit": (["k_proj", "v_proj", "fc2"], ["fc2"]),
}


def randomize(model, name="default"):
    """Vectors that are not ones."""
    for key, parameter in model.named_parameters():
        if "ia3_l" in key and key.endswith(f".{name}"):
            parameter.data = torch.rand_like(parameter) + 0.5
    return model


def ia3(kind="llama", sizes=(), *, four_bit=False, dtype=torch.float32, prepare=None, **options):
    """(a model with IA3, inputs)."""
    model, inputs = getattr(tiny_models, kind)(*sizes)
    model = model.to(dtype)
    if four_bit:
        tiny_models.quantize(model)
    targets, feedforward = TARGETS[kind]
    config = IA3Config(target_modules=targets, feedforward_modules=feedforward, **options)
    return randomize(get_peft_model(prepare(model) if prepare else model, config)), inputs


def two_adapters(kind="llama", **options):
    model, inputs = ia3(kind, **options)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    return randomize(model, "other"), inputs


def exact_copy(stock):
    """In float64. IA3's layer over 4-bit weights would convert its input to fp32."""
    model = float64_copy(stock)
    for module in model.modules():
        if type(module) is Linear4bit:
            module.__class__ = Linear
    return model


def compare(fused, stock, inputs, context=contextlib.nullcontext):
    exact_inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    exact = step(exact_copy(stock), exact_inputs)
    with context():
        assert_near(step(fused, inputs), step(stock, inputs), exact)


def fused_copy(stock):
    fused = copy.deepcopy(stock)
    return fused, fusetune.fuse(fused)


# --- equality -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("four_bit", [False, True])
def test_models(kind, four_bit, calls):
    if four_bit and kind == "gpt2":
        pytest.skip("Conv1D is not quantised")
    stock, inputs = ia3(kind, four_bit=four_bit)
    fused, report = fused_copy(stock)
    layers = [row for row in report.rows if row.method.startswith("IA3")]
    if kind == "gpt2":
        assert {row.reason for row in layers} == {"base_layer is a Conv1D, not a plain Linear"}
    else:
        assert all(row.fused for row in layers)
    compare(fused, stock, inputs)
    assert calls.count("ia3_linear") == sum(row.fused for row in layers)
    assert len(layers) > 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision_base(dtype, autocast_adapter_dtype, calls):
    stock, inputs = ia3(dtype=dtype)
    if not autocast_adapter_dtype:
        for name, parameter in stock.named_parameters():
            parameter.data = parameter.data.to(dtype) if "ia3_l" in name else parameter.data
    fused, _ = fused_copy(stock)
    compare(fused, stock, inputs)
    assert calls.count("ia3_linear") == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("four_bit", [False, True])
def test_autocast(four_bit, dtype, calls):
    stock, inputs = ia3(four_bit=four_bit, dtype=dtype)
    fused, _ = fused_copy(stock)
    compare(fused, stock, inputs, lambda: torch.autocast("cpu", torch.bfloat16))
    assert calls.count("ia3_linear") == 6


def test_4bit_layers_in_16_bits_give_back_16_bits(calls):
    """PEFT 0.21: keys and values become fp32, and attention refuses them beside the queries."""
    stock, inputs = ia3(four_bit=True, dtype=torch.bfloat16)
    fused, _ = fused_copy(stock)
    with pytest.raises(RuntimeError, match="same dtype"):
        stock(**inputs)
    dense, _ = ia3(dtype=torch.bfloat16)
    for name, module in float64_copy(stock).named_modules():
        if isinstance(module, torch.nn.Linear):
            dense.get_submodule(name).weight.data = module.weight.data.bfloat16()
    vectors = {n: v for n, v in fused.state_dict().items() if "ia3_l" in n}
    dense.load_state_dict(vectors, strict=False)
    assert_near(step(fused, inputs), step(dense, inputs), step(exact_copy(stock), inputs))
    assert calls.count("ia3_linear") == 6


def test_several_active_adapters_multiply(calls):
    stock, inputs = two_adapters()
    stock.base_model.set_adapter(["default", "other"])
    fused, report = fused_copy(stock)
    assert all(row.fused for row in report.rows)
    compare(fused, stock, inputs)
    assert calls.count("ia3_linear") == 6
    assert sum("other" in name for name in step(fused, inputs)) == 6


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, calls):
    stock, inputs = ia3()
    fused, _ = fused_copy(stock)
    expected = step(stock, inputs)
    fused.train()
    fused.enable_input_require_grads()
    fused.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    got = step(fused, inputs)
    assert calls.count("ia3_linear") == 12
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


def test_compiles_in_one_graph(fresh_compiler):
    stock, inputs = ia3("llama", [1])
    fused, _ = fused_copy(stock)
    expected = step(fused, inputs)
    got = step(torch.compile(fused, backend="aot_eager", fullgraph=True), inputs)
    torch.testing.assert_close(got["logits"], expected["logits"])
    name = "base_model.model.model.layers.0.mlp.down_proj.ia3_l.default"
    torch.testing.assert_close(got[f"_orig_mod.{name}"], expected[name])


# --- the rest of PEFT -----------------------------------------------------------------------------


def test_reasons():
    model, _ = two_adapters()
    report = fusetune.fuse(model)
    assert [row.method for row in report.fused].count("IA3") == 6
    model.base_model.set_adapter([])
    assert {row.reason for row in report.refresh().stock} == {"no active adapter"}
    model.set_adapter("other")
    with model.disable_adapter():
        assert {row.reason for row in report.refresh().stock} == {"adapters are disabled"}
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.k_proj")
    layer.base_layer.register_forward_hook(lambda *_: None)
    model.merge_adapter()
    reasons = {row.reason for row in report.refresh().stock}
    assert reasons == {"base_layer has hooks", "the adapter is merged"}


def test_convolutions_are_listed_with_a_reason():
    model, _ = tiny_models.vit()
    config = IA3Config(target_modules=["projection", "k_proj"], feedforward_modules=[])
    [row] = fusetune.fuse(get_peft_model(model, config)).stock
    assert row.reason == "ia3.Conv2d has no fused path"


@pytest.mark.usefixtures("stock_base")
def test_merge_unmerge_disable_and_unload(calls):
    stock, inputs = ia3("bert")
    stock.eval()
    fused, _ = fused_copy(stock)
    base, _ = fused_copy(stock)
    expected = fused(**inputs).logits
    with fused.disable_adapter(), stock.disable_adapter():
        calls.clear()
        assert torch.equal(fused(**inputs).logits, stock(**inputs).logits)
    fused.merge_adapter()
    torch.testing.assert_close(fused(**inputs).logits, expected)
    assert "ia3_linear" not in calls
    with pytest.warns(UserWarning, match="Unmerge result can be inaccurate"):
        fused.unmerge_adapter()
    torch.testing.assert_close(fused(**inputs).logits, expected)
    merged = fused.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, expected)
    with stock.disable_adapter():
        assert torch.equal(base.unload()(**inputs).logits, stock(**inputs).logits)


def test_checkpoints_go_both_ways(tmp_path):
    stock, inputs = ia3("bert", modules_to_save=["decoder"])
    fused, _ = fused_copy(stock)
    assert fused.state_dict().keys() == stock.state_dict().keys()
    for source, name in ((fused, "fused"), (stock, "stock")):
        randomize(source)
        source.save_pretrained(tmp_path / name)
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(tiny_models.bert()[0], tmp_path / name)
        again.base_model.model.load_state_dict(source.base_model.model.state_dict())
        if source is stock:
            fusetune.fuse(again)
        torch.testing.assert_close(again(**inputs).logits, source(**inputs).logits)
        files = {f.name for f in (tmp_path / name).iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= files


@pytest.mark.parametrize("four_bit", [False, True])
def test_copies_pickles_and_unfuse(four_bit, calls):
    stock, inputs = ia3(four_bit=four_bit)
    fused, _ = fused_copy(stock)
    expected = fused(**inputs).logits
    copies = [copy.deepcopy(fused)]
    if not four_bit:  # bitsandbytes' weights lose their class
        copies.append(pickle.loads(pickle.dumps(fused)))
    for other in copies:
        calls.clear()
        assert torch.equal(other(**inputs).logits, expected)
        assert calls.count("ia3_linear") == 6
    calls.clear()
    fusetune.unfuse(fused)
    assert torch.equal(fused(**inputs).logits, stock(**inputs).logits)
    assert not calls
    assert [type(m) for m in fused.modules()] == [type(m) for m in stock.modules()]


# --- adapters by row ------------------------------------------------------------------------------

NAMES = ["other", "__base__", "default"]


def batch(rows=3):
    return {"input_ids": torch.randint(1, tiny_models.VOCABULARY, (rows, 7))}


def alone(model, name):
    """The model with one adapter, or none."""
    if name == "__base__":
        return model.disable_adapter()
    model.set_adapter(name)
    return contextlib.nullcontext()


def test_stock_peft_ignores_adapter_names():
    """Fault D5 of PEFT 0.21: every row gets the active adapter."""
    stock, _ = two_adapters()
    stock.eval()
    inputs = batch()
    assert torch.equal(stock(**inputs, adapter_names=NAMES).logits, stock(**inputs).logits)


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("four_bit", [False, True])
def test_rows_have_their_own_adapters(four_bit, kind):
    model, _ = two_adapters(kind, four_bit=four_bit)
    fusetune.fuse(model)
    model.eval()
    inputs = batch()
    if kind == "t5":
        inputs["decoder_input_ids"] = batch()["input_ids"]
    got = model(**inputs, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        with alone(model, name):
            one = {key: value[row : row + 1] for key, value in inputs.items()}
            torch.testing.assert_close(got[row], model(**one).logits[0], rtol=1e-4, atol=1e-5)
    assert not any("_fusetune_rows" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=str)
def test_training_by_row(checkpointing):
    """checkpointing: use_reentrant; layers computed again find the rows' names too."""
    model, _ = two_adapters()
    fusetune.fuse(model)
    inputs = batch()
    labels = inputs["input_ids"].clone()
    expected = {}
    for row, name in enumerate(NAMES):
        if name == "__base__":
            continue
        model.set_adapter(name)
        one = {"input_ids": inputs["input_ids"][row : row + 1], "labels": labels[row : row + 1]}
        _, _, grads = tiny_models.loss_and_grads(model, one)
        expected.update(grads)
    model.base_model.set_adapter(["default", "other"])
    model.train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    model.zero_grad()
    (3 * model(**inputs, labels=labels, adapter_names=NAMES).loss).backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_by_row(beams, kind):
    model, _ = two_adapters(kind)
    for parameter in model.parameters():
        parameter.data *= 2  # so that adapters decide
    fusetune.fuse(model)
    model.eval()
    ids = batch()["input_ids"]
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    got = model.generate(input_ids=ids, attention_mask=mask, adapter_names=NAMES, **options)
    for row, name in enumerate(NAMES):
        with alone(model, name):
            one = slice(row, row + 1)
            alike = model.generate(input_ids=ids[one], attention_mask=mask[one], **options)
            assert torch.equal(got[one, : alike.shape[1]], alike)


def test_heads_by_row():
    """Each row has its own adapter's modules_to_save as well."""
    model, _ = two_adapters("llama", modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head.modules_to_save
    head["other"].weight.data += 1
    fusetune.fuse(model)
    model.eval()
    inputs = batch()
    got = model(**inputs, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        with alone(model, name):
            torch.testing.assert_close(got[row], model(**inputs).logits[row], rtol=1e-4, atol=1e-4)


def test_wrong_names_are_refused():
    model, _ = two_adapters()
    fusetune.fuse(model)
    inputs = batch()
    for names, error in (
        (["other", "none", "default"], "'none' is none of"),
        (["other"], "each of 3 rows, got 1"),
        ("other", "must be a list of names"),
    ):
        with pytest.raises(ValueError, match=error):
            model(**inputs, adapter_names=names)
    model.merge_adapter()
    with pytest.raises(ValueError, match="an adapter is merged"):
        model(**inputs, adapter_names=NAMES)
    model, inputs = tiny_models.vit()
    config = IA3Config(target_modules=["projection"], feedforward_modules=[])
    convolution = get_peft_model(model, config)
    fusetune.fuse(convolution)
    with pytest.raises(ValueError, match=r"ia3\.Conv2d has no fused path"):
        convolution(**inputs, adapter_names=["default"] * 2)


# --- merging into 4 bits --------------------------------------------------------------------------

GAP = {"nf4": 1 - 0.6961928, "fp4": 1 / 3}


def scaled(layer):
    weight = float64_copy(torch.nn.Sequential(layer.base_layer))[0].weight.detach()
    scale = layer.ia3_l["default"].detach().double().flatten()
    return weight * (scale if layer.is_feedforward else scale[:, None])


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_merging_into_4_bits(quant_type, double):
    options = {"quant_type": quant_type, "compress_statistics": double}
    model, inputs = ia3("bert", prepare=lambda m: tiny_models.quantize(m, **options))
    model.eval()
    with pytest.raises(ValueError, match="Cannot merge ia3 layers when the model is loaded in 4"):
        model.merge_and_unload()
    fusetune.fuse(model)
    before = model(**inputs).logits
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "ia3_l")}
    exact = {name: scaled(layer) for name, layer in layers.items()}
    bias = {
        n: m.base_layer.bias.clone() * m.ia3_l["default"].flatten()
        for n, m in layers.items()
        if not m.is_feedforward
    }
    codes = {name: layer.base_layer.weight.data.clone() for name, layer in layers.items()}
    merged = fusetune.merge_ia3_4bit(model)
    for name, true in exact.items():
        base = merged.get_submodule(name.removeprefix("base_model.model."))
        assert isinstance(base, bnb.nn.Linear4bit)
        got = float64_copy(torch.nn.Sequential(base))[0].weight.detach()
        state = base.weight.quant_state
        assert (state.nested, state.quant_type, state.dtype) == (double, quant_type, torch.float32)
        ideal = true.flatten().view(-1, 64).abs().amax(1, keepdim=True)
        weight = fusetune.QuantizedWeight.from_bnb(base.weight)
        kept = fusetune.ops.dequantize_4bit(weight, torch.float64).view(-1, 64).abs().amax(1, True)
        rounding = 1e-6 * ideal
        bound = GAP[quant_type] / 2 * ideal + (kept - ideal).abs() + rounding
        error = (got - true).view(-1, 64).abs()
        assert (error <= bound).all()
        assert error.max() > 0
        if not layers[name].is_feedforward:
            assert (error <= (kept - ideal).abs() + rounding).all()
            # FP4 has two codes for zero.
            assert quant_type == "fp4" or torch.equal(base.weight.data, codes[name])
            torch.testing.assert_close(base.bias, bias[name])
    after = merged(**inputs).logits
    assert 0 < (after - before).norm() / before.norm() < 0.2
    assert not any("ia3" in name for name, _ in merged.named_modules())


def test_merging_a_negative_factor_and_dense_layers_beside():
    model, inputs = ia3("t5", four_bit=True)  # wo is dense there
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            parameter.data[..., :1] *= -1
    model.eval()
    fusetune.fuse(model)
    before = model(**inputs).logits
    after = fusetune.merge_ia3_4bit(model)(**inputs).logits
    assert 0 < (after - before).norm() / before.norm() < 0.5


def test_bad_merges_change_nothing():
    with pytest.raises(TypeError, match="model must be a PeftModel with IA3, got LlamaForCausalLM"):
        fusetune.merge_ia3_4bit(tiny_models.llama(1)[0])
    model, _ = ia3(four_bit=True)
    with pytest.raises(ValueError, match=r"adapter_names: 'none' is none of .*\['default'\]"):
        fusetune.merge_ia3_4bit(model, ["none"])
    path = "base_model.model.model.layers.1.mlp.down_proj"
    layer = model.get_submodule(path)
    state = copy.deepcopy(model.state_dict())
    layer.ia3_l["default"].data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        fusetune.merge_ia3_4bit(model)
    layer.ia3_l["default"].data = state[f"{path}.ia3_l.default"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
