"""BitFit: only biases are trained, each by sums of its layer's gradient in fp32."""

import contextlib
import copy
import json
import pickle

import pytest
import tiny_models
import torch
from peft import PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from tolerance import one_thread
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import fusetune
from fusetune import BitFitConfig
from fusetune.methods.bitfit.layer import BitFitLayer
from fusetune.ops._trained_bias import trained_bias

FAMILIES = ("bert", "gpt2", "vit")
PREFIX = "base_model.model."


def base(family):
    """(a model whose biases are not zero, inputs); the same for the same family."""
    torch.manual_seed(7)
    model, inputs = getattr(tiny_models, family)()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn_like(parameter) / 4
    return model.eval(), inputs


def bitfit(family="bert", prepare=lambda m: m, **options):
    model, inputs = base(family)
    return get_peft_model(prepare(model), BitFitConfig(**options)).eval(), inputs


def move(model, name="default"):
    """An adapter that is not the base's biases."""
    for layer in layers(model).values():
        if name in layer.bitfit_bias:
            bias = layer.bitfit_bias[name]
            bias.data += torch.randn_like(bias) / 4
    return model


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, BitFitLayer)}


def logits(model, inputs, **options):
    with torch.no_grad():
        return model(**inputs, **options).logits


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# --- which biases ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_all_are_those_of_the_backbone(family):
    plain, _ = base(family)
    model, _ = bitfit(family)
    inside = f"{plain.base_model_prefix}."
    own = {n for n, p in plain.named_parameters() if n.endswith(".bias") and n.startswith(inside)}
    assert {f"{name.removeprefix(PREFIX)}.bias" for name in layers(model)} == own
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.bitfit_bias.default" for name in layers(model)}
    assert any("ln" in n.lower() or "layernorm" in n.lower() for n in own)
    assert model.get_nb_trainable_parameters()[0] < 0.05 * plain.num_parameters()


def test_the_papers_two():
    """Section 4 of the paper: queries and the middle of the MLP, about half of all biases."""
    model, _ = bitfit("bert", subset="bq_bm2")
    names = {name.removeprefix(f"{PREFIX}bert.encoder.layer.") for name in layers(model)}
    kinds = ("attention.self.query", "intermediate.dense")
    assert names == {f"{i}.{kind}" for i in range(2) for kind in kinds}
    assert {name.split(".")[-1] for name in layers(bitfit("vit", subset="bq_bm2")[0])} == {
        "q_proj",
        "fc1",
    }


def test_by_names():
    model, _ = bitfit(subset=["layer.1.output.dense", r".*\.0\..*\.(query|key)", "decoder"])
    inside = f"{PREFIX}bert.encoder.layer."
    names = {name.removeprefix(inside).removeprefix(PREFIX) for name in layers(model)}
    self = "0.attention.self."
    assert names == {"1.output.dense", f"{self}query", f"{self}key", "cls.predictions.decoder"}


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_model_without_biases_is_refused(family):
    model, _ = base(family)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=f"BitFit trains biases, and a {family} has none"):
        get_peft_model(model, BitFitConfig())
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"subset": "some"}, r"subset must be one of \('all', 'bq_bm2'\) or a list.*'some'"),
        ({"subset": []}, "subset must be one of"),
        ({"subset": [3]}, r"subset must be one of .* got \[3\]"),
        ({"subset": ["nowhere"]}, "subset: 'nowhere' is the name of no module that has a bias"),
        ({"subset": "bq_bm2"}, "c_attn has one for queries, keys and values; give the names"),
    ],
)
def test_bad_configs(options, error):
    with pytest.raises(ValueError, match=error):
        get_peft_model(base("gpt2")[0], BitFitConfig(**options))


@pytest.mark.parametrize("name", ["", "a.b", "dense", "bitfit_bias", "keys"])
def test_bad_names(name):
    with pytest.raises(ValueError, match=r"adapter_name: .* PEFT could not tell"):
        get_peft_model(base("bert")[0], BitFitConfig(), adapter_name=name)


# --- what is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_models_biases(family):
    """Against the model itself with its biases trained, which BitFit's authors do."""
    model, inputs = bitfit(family)
    plain, _ = base(family)
    names = {f"{name.removeprefix(PREFIX)}.bias": name for name in layers(model)}
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in names)
    assert torch.equal(logits(model, inputs), logits(plain, inputs))
    got, expected = gradients(model, inputs), gradients(plain, inputs)
    assert {f"{names[name]}.bitfit_bias.default" for name in expected} == got.keys()
    for name, value in expected.items():
        if name.endswith(("key.bias", "k_proj.bias")):  # zero but for rounding: softmax
            continue
        torch.testing.assert_close(got[f"{names[name]}.bitfit_bias.default"], value)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_4bit_layers(dtype, fused):
    def prepare(model):
        return tiny_models.quantize(model.to(dtype))

    model, inputs = bitfit("bert", prepare)
    plain = prepare(base("bert")[0])
    if fused:
        fusetune.fuse(model)
        fusetune.fuse(plain)
    model.train(), plain.train()  # bitsandbytes repacks weights for inference on some CPUs
    assert torch.equal(logits(model, inputs), logits(plain, inputs))
    got = gradients(model, inputs)
    assert got
    assert {value.dtype for value in got.values()} == {torch.float32}
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(f"{PREFIX}{name.removesuffix('.bias')}" in layers(model))
    expected = gradients(plain, inputs)
    name = "bert.encoder.layer.1.output.dense"
    rounding = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        got[f"{PREFIX}{name}.bitfit_bias.default"],
        expected[f"{name}.bias"].float(),
        rtol=rounding,
        atol=rounding * expected[f"{name}.bias"].abs().max().item(),
    )
    before = logits(move(model), inputs)
    assert torch.equal(logits(model.merge_and_unload(), inputs), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sums_are_fp32s(dtype):
    """Autograd rounds the sum to 16 bits. And twice the same, on any number of threads."""
    layer = nn.Linear(8, 33).to(dtype).requires_grad_(False)
    x, dy = torch.randn(4, 700, 8, dtype=dtype), torch.randn(4, 700, 33, dtype=dtype)
    bias = layer.bias.float().requires_grad_()
    (got,) = torch.autograd.grad(trained_bias(layer(x), bias), bias, dy)
    exact = dy.double().sum((0, 1))
    error = (got.double() - exact).abs().max()
    assert error <= 64 * torch.finfo(torch.float32).eps * dy.double().abs().sum((0, 1)).max()
    wide = bias.detach().requires_grad_()
    y = nn.functional.linear(x, layer.weight, wide.to(dtype))
    (eager,) = torch.autograd.grad(y, wide, dy)
    assert error < (eager.double() - exact).abs().max() / 8
    with one_thread():
        (alone,) = torch.autograd.grad(trained_bias(layer(x), bias), bias, dy)
    assert torch.equal(alone, got)


def test_the_sum_along_any_dimension_and_twice():
    y = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    for dim in (-1, -3, 1, 2):
        bias = torch.randn(y.shape[dim], dtype=torch.float64, requires_grad=True)

        def add(y, b, dim=dim):
            y = y + b.detach().view([-1 if d == dim % 4 else 1 for d in range(4)])
            return trained_bias(y, b, dim).relu_() ** 2

        fresh = y.detach().clone().requires_grad_()
        add(fresh, bias).sum().backward()
        plain_y, plain_b = y.detach().clone().requires_grad_(), bias.detach().requires_grad_()
        shaped = plain_b.view([-1 if d == dim % 4 else 1 for d in range(4)])
        ((plain_y + shaped).relu() ** 2).sum().backward()
        torch.testing.assert_close(bias.grad, plain_b.grad)
        torch.testing.assert_close(fresh.grad, plain_y.grad)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    factor = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def square(b, f):
        return (trained_bias(f + b.detach(), b) ** 2 * f).sum()

    (db,) = torch.autograd.grad(square(bias, factor), bias, create_graph=True)
    (second,) = torch.autograd.grad(db.sum(), factor)
    torch.testing.assert_close(second, 2 * (2 * factor + bias).detach())


@pytest.mark.parametrize("dim", [-1, 2])
def test_a_gradient_with_gaps_is_copied_for_the_layer_too(dim):
    """Attention's are: the layer, whose matmul needs rows without gaps, would copy it again."""
    y = torch.randn(2, 6, 8, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    dy = torch.randn(2, 8, 6).transpose(1, 2)
    seen = []
    y.register_hook(seen.append)
    trained_bias(y, bias, dim).backward(dy)
    assert seen[0].is_contiguous()
    assert torch.equal(seen[0], dy)
    torch.testing.assert_close(bias.grad, dy.sum((0, 1)))


def test_no_layer_computes_a_weights_gradient():
    model, inputs = bitfit()
    names = []
    seen, todo = set(), [model(**inputs).loss.grad_fn]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        names.append(node.name())
        todo += [inner for inner, _ in node.next_functions if inner is not None]
    leaves = {node.variable for node in seen if node.name().endswith("AccumulateGrad")}
    assert {id(p) for p in leaves} == {id(p) for p in model.parameters() if p.requires_grad}
    assert names.count("_TrainedBiasBackward") == len(layers(model))


def test_what_is_not_known_is_autograds():
    """Hooks on the module may change what it gives back: then the sum is not the gradient."""
    model, inputs = bitfit(subset=["layer.1.output.dense", "layer.0.output.dense"])
    path = f"{PREFIX}bert.encoder.layer.1.output.dense"
    model.get_submodule(path).base_layer.register_forward_hook(lambda m, args, y: 2 * y)
    plain, _ = base("bert")
    module = plain.get_submodule(path.removeprefix(PREFIX))
    module.register_forward_hook(lambda m, args, y: 2 * y)
    report = {row.module: row for row in fusetune.fuse(model).rows if row.method == "BitFit"}
    assert report[path].reason == "a Linear with hooks, or of an unknown kind"
    assert report[path.replace("layer.1", "layer.0")].fused
    expected = gradients(plain, inputs)[f"{path.removeprefix(PREFIX)}.bias"]
    torch.testing.assert_close(gradients(model, inputs)[f"{path}.bitfit_bias.default"], expected)


def test_report():
    model, _ = bitfit()
    report = fusetune.fuse(model)
    rows = [row for row in report.rows if row.method == "BitFit"]
    assert len(rows) == len(layers(model))
    assert {row.reason for row in rows} == {None}
    with model.disable_adapter():
        reasons = {row.reason for row in report.refresh().rows if row.method == "BitFit"}
    assert reasons == {"adapters are disabled, or none is active"}
    model.merge_adapter()
    reasons = {row.reason for row in report.refresh().rows if row.method == "BitFit"}
    assert reasons == {"the adapter is merged"}


# --- what PEFT's users do -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_trains_saves_and_loads(family, tmp_path):
    model, inputs = bitfit(family)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    model(**inputs).loss.backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"{name}.bitfit_bias.default" for name in layers(model)}
    states = [t for s in optimizer.state.values() for t in s.values() if t.dim()]
    assert sum(t.numel() for t in states) == 2 * model.get_nb_trainable_parameters()[0]
    expected = logits(model.eval(), inputs)
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert file.keys() == {f"{name}.bitfit_bias" for name in layers(model)}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["subset"]) == ("BITFIT", "all")
    for low in (True, False):
        given = {"low_cpu_mem_usage": low}
        loaded = PeftModel.from_pretrained(base(family)[0], tmp_path, **given).eval()
        assert torch.equal(logits(loaded, inputs), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    more = PeftModel.from_pretrained(base(family)[0], tmp_path, is_trainable=True)
    assert gradients(more, inputs).keys() == changed


@pytest.mark.parametrize("family", FAMILIES)
def test_disabling_merging_and_unloading(family):
    plain, inputs = base(family)
    own = logits(plain, inputs)
    model, _ = bitfit(family)
    move(model)
    changed = logits(model, inputs)
    assert not torch.allclose(changed, own, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), own)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(logits(model, inputs), changed)
    model.unmerge_adapter()
    assert torch.equal(logits(model, inputs), changed)
    with model.disable_adapter():  # bit for bit, after merging too
        assert torch.equal(logits(model, inputs), own)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(logits(merged, inputs), changed)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded, inputs), own)
    for result in (merged, unloaded):
        assert result.state_dict().keys() == plain.state_dict().keys()
        assert [type(m) for m in result.modules()] == [type(m) for m in plain.modules()]


def test_a_broken_adapter_is_not_merged():
    model, _ = bitfit()
    next(iter(layers(model).values())).bitfit_bias["default"].data[0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected in the merged bias"):
        model.merge_adapter(safe_merge=True)


def test_several_adapters(tmp_path):
    model, inputs = bitfit()
    move(model)
    first = logits(model, inputs)
    model.add_adapter("other", BitFitConfig(subset="bq_bm2"))
    assert torch.equal(logits(model, inputs), first)
    model.set_adapter("other")
    with model.disable_adapter():
        own = logits(model, inputs)
    assert torch.equal(logits(model, inputs), own)  # it starts from the base
    move(model, "other")
    second = logits(model, inputs)
    assert set(gradients(model, inputs)) == {
        f"{n}.bitfit_bias.other" for n, m in layers(model).items() if "other" in m.bitfit_bias
    }
    model.save_pretrained(tmp_path)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, inputs)
    expected, _ = base("bert")
    for name, layer in layers(model).items():
        bias = expected.get_submodule(name.removeprefix(PREFIX)).bias
        own_bias = bias.data.clone()
        for value in layer.bitfit_bias.values():
            bias.data += value.data - own_bias
    torch.testing.assert_close(both, logits(expected, inputs))
    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs), both)
    model.unmerge_adapter()
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(logits(model, inputs), second)
    assert not any("default" in name for name, _ in model.named_parameters())
    model.load_adapter(tmp_path / "other", "again")
    model.set_adapter("again")
    assert torch.equal(logits(model, inputs), second)


def test_the_head_is_saved_whole(tmp_path):
    def classifier():
        torch.manual_seed(1)
        config = BertConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=3,
        )
        return BertForSequenceClassification(config).eval()

    inputs = {**tiny_models.token_inputs(), "labels": torch.tensor([0, 2])}
    model = get_peft_model(classifier(), BitFitConfig(task_type=TaskType.SEQ_CLS)).eval()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    head = {f"{PREFIX}classifier.modules_to_save.default.{part}" for part in ("weight", "bias")}
    assert head == {name for name in trained if "classifier" in name}
    assert f"{PREFIX}bert.pooler.dense.bitfit_bias.default" in trained
    move(model)
    model.get_submodule(f"{PREFIX}classifier").modules_to_save["default"].weight.data += 1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(classifier(), tmp_path).eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_rows_have_their_own_adapters():
    model, _ = bitfit("gpt2")
    move(model)
    model.add_adapter("other", BitFitConfig(subset=["mlp.c_fc"]))
    move(model, "other")
    ids = torch.randint(1, 97, (3, 7))
    names = ["other", "__base__", "default"]
    got = logits(model, {"input_ids": ids}, adapter_names=names)
    model.base_model.set_adapter(["default", "other"])
    model.zero_grad()
    model(input_ids=ids, adapter_names=names).logits.square().sum().backward()
    for row, name in enumerate(names):
        one = {"input_ids": ids[row : row + 1]}
        if name != "__base__":
            model.set_adapter(name)
        with model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            torch.testing.assert_close(got[row], logits(model, one)[0], rtol=1e-4, atol=1e-5)
        if name == "__base__":
            continue
        own = {n: p for n, p in model.named_parameters() if n.endswith(f"bias.{name}")}
        loss = model(**one).logits.square().sum()
        grads = torch.autograd.grad(loss, list(own.values()))
        for parameter, grad in zip(own.values(), grads, strict=True):
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="'none' is none of"):
        model(input_ids=ids, adapter_names=["none"] * 3)
    model.merge_adapter()
    with pytest.raises(ValueError, match="an adapter is merged"):
        model(input_ids=ids, adapter_names=names)


def test_copies_pickles_and_checkpointing():
    model, inputs = bitfit("gpt2")
    move(model)
    expected, grads = logits(model, inputs), gradients(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, inputs), expected)
    for use_reentrant in (False, True):
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        again = gradients(model, inputs)
        assert again.keys() == grads.keys()
        for name, value in grads.items():
            torch.testing.assert_close(again[name], value)


def test_autocast():
    model, inputs = bitfit()
    with torch.autocast("cpu", torch.bfloat16):
        grads = gradients(model, inputs)
    assert {value.dtype for value in grads.values()} == {torch.float32}
    exact = gradients(model, inputs)
    for name, value in grads.items():
        if "key" not in name:
            assert (value - exact[name]).norm() < 0.1 * exact[name].norm(), name


def test_compiles_in_one_graph():
    torch.compiler.reset()
    model, inputs = bitfit(subset=["layer.0.output.dense", "layer.0.output.LayerNorm"])
    expected = gradients(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = gradients(compiled, inputs)
    for name, value in expected.items():
        torch.testing.assert_close(got[f"_orig_mod.{name}"], value)
