"""PEFT's AdaLoRA layers, fused: equal to PEFT's, and nothing else of them changes."""

import copy
import pickle

import pytest
import tiny_models
import torch
from adalora_models import adalora, ranknums
from model_equality import assert_near, float64_copy, step
from peft import AdaLoraConfig, PeftModel
from peft.tuners.adalora import AdaLoraModel, SVDLinear
from peft.tuners.adalora.bnb import SVDLinear4bit
from tolerance import assert_same
from torch import nn

import fusetune
from fusetune.integrations.peft_adalora import FusedAdaLoraModel, FusedSVDLinear
from fusetune.integrations.peft_adalora_bnb import FusedSVDLinear4bit

LAYER = "base_model.model.model.layers.0.mlp.gate_proj"


def pair(kind="llama", **options):
    """(stock, fused, inputs)"""
    stock, inputs = adalora(kind, **options)
    fused = copy.deepcopy(stock)
    report = fusetune.fuse(fused)
    assert report.stock == []
    return stock, fused, inputs


def logits(model, inputs):
    with torch.no_grad():
        return model(input_ids=inputs["input_ids"]).logits


# --- results --------------------------------------------------------------------------------------


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_loss_and_gradients_are_pefts(kind, four_bit, calls):
    stock, fused, inputs = pair(kind, four_bit=four_bit)
    got, expected = step(fused, inputs), step(stock, inputs)
    layers = sum("lora_A" in name for name in got)
    assert layers == calls.count("lora_linear") >= 7
    assert calls.count("orthogonality") == (kind == "llama")
    assert sum("lora_E" in name for name in got) == sum("lora_B" in name for name in got) == layers
    assert_near(got, expected, step(float64_copy(stock), inputs))


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upcast", [True, False])
def test_half_precision_base(dtype, four_bit, upcast, calls):
    stock, fused, inputs = pair(dtype=dtype, four_bit=four_bit, autocast_adapter_dtype=upcast)
    if not four_bit:  # PEFT has those in the layer's compute dtype, fp32 here
        adapter = fused.get_submodule(LAYER).lora_A["default"]
        assert adapter.dtype == (torch.float32 if upcast else dtype)
    exact, expected = step(float64_copy(stock), inputs), step(stock, inputs)
    for name in ranknums(stock):  # which PEFT trains by mistake: see below
        exact.pop(name, None), expected.pop(name, None)
    assert_near(step(fused, inputs), expected, exact)
    assert calls.count("lora_linear") == 7


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("four_bit", [False, True])
def test_autocast(base, four_bit, calls):
    stock, fused, inputs = pair(dtype=base, four_bit=four_bit)
    with torch.autocast("cpu", torch.bfloat16):
        got, eager = step(fused, inputs), step(stock, inputs)
    exact = step(float64_copy(stock), inputs)
    for name in ranknums(stock):
        exact.pop(name, None), eager.pop(name, None)
    assert_near(got, eager, exact)
    assert calls.count("lora_linear") == 7


@pytest.mark.parametrize("four_bit", [False, True])
def test_dropout_is_the_ops_and_off_in_evaluation(four_bit, monkeypatch, calls):
    """With PEFT's dropout replaced by the op's mask the results are the same."""
    from fusetune.reference.dropout import dropout, new_seed

    stock, fused, inputs = pair(four_bit=four_bit, lora_dropout=0.4)
    ours, theirs = fused.train().get_submodule(LAYER), stock.train().get_submodule(LAYER)
    x = torch.randn(6, 64, requires_grad=True)
    torch.manual_seed(3)
    got = ours(x)
    torch.manual_seed(3)
    seed = new_seed(x.device)
    with monkeypatch.context() as patched:
        drop = theirs.lora_dropout["default"]
        patched.setattr(drop, "forward", lambda rows: dropout(rows, 0.4, seed))
        torch.testing.assert_close(got, theirs(x))
    assert not torch.allclose(got, ours(x))
    without, _ = adalora(four_bit=four_bit)
    torch.testing.assert_close(logits(fused.eval(), inputs), logits(without.train(), inputs))
    assert calls.count("lora_linear") == 2 + 7


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 3, 64), (2, 0, 64)])
def test_shapes_of_the_input(four_bit, shape, calls):
    stock, fused, _ = pair(four_bit=four_bit)
    x = torch.randn(shape)
    torch.testing.assert_close(fused.get_submodule(LAYER)(x), stock.get_submodule(LAYER)(x))
    assert calls == ["lora_linear"]


def test_base_bias_and_strided_input(calls):
    stock, fused, _ = pair("bert", bias="all")
    path = "base_model.model.bert.encoder.layer.0.intermediate.dense"
    x = torch.randn(64, 5).T
    results = []
    for model in (fused, stock):
        layer, given = model.get_submodule(path), x.detach().requires_grad_()
        y = layer(given)
        bias = layer.base_layer.bias
        assert bias.requires_grad
        results.append((y, *torch.autograd.grad(y.square().sum(), (given, bias))))
    for got, expected in zip(*results, strict=True):
        assert_same(got, expected)
    assert calls == ["lora_linear"]


# --- PEFT's fault: a trained ranknum --------------------------------------------------------------


def test_d1_ranknum_drifts_in_stock_peft_and_is_a_constant_here():
    """On a 16-bit base PEFT trains `ranknum`, and the scaling with it."""
    stock, fused, inputs = pair(dtype=torch.bfloat16)
    assert all(p.requires_grad for p in ranknums(stock).values())
    assert not any(p.requires_grad for p in ranknums(fused).values())
    for model in (stock, fused):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.1)
        for _ in range(3):
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all((p - 6).abs() > 1e-3 for p in ranknums(stock).values())
    assert all(p.item() == 6 and p.grad is None for p in ranknums(fused).values())


def test_d1_an_optimizer_from_before_fuse_does_not_move_ranknum():
    model, inputs = adalora(dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**inputs).loss.backward()
    fusetune.fuse(model)
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        model(**inputs).loss.backward()
    assert all(p.item() == 6 for p in ranknums(model).values())


def test_d1_an_unfrozen_ranknum_has_no_gradient_on_the_fused_path():
    _, fused, inputs = pair()
    for parameter in ranknums(fused).values():
        parameter.requires_grad_()
    fused(**inputs).loss.backward()
    assert all(p.grad is None for p in ranknums(fused).values())
    fusetune.fuse(fused)
    assert not any(p.requires_grad for p in ranknums(fused).values())


# --- what PEFT can do with a model ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("four_bit", [False, True])
def test_fuse_and_unfuse_leave_no_trace(four_bit, dtype):
    model, _ = adalora(four_bit=four_bit, dtype=dtype)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("ranknum" in name for name in trained) == (dtype == torch.bfloat16 and not four_bit)
    modules = dict(model.named_modules())
    before = {name: (type(m), dict(m.__dict__)) for name, m in modules.items()}
    keys = list(model.state_dict())
    fusetune.fuse(model)
    fusetune.fuse(model)
    assert list(model.state_dict()) == keys
    assert not any(p.requires_grad for p in ranknums(model).values())
    kinds = {type(m) for m in model.modules()}
    assert {FusedAdaLoraModel, FusedSVDLinear4bit if four_bit else FusedSVDLinear} <= kinds
    fusetune.unfuse(model)
    for name, module in modules.items():
        assert (type(module), module.__dict__) == before[name]
    assert trained == [name for name, p in model.named_parameters() if p.requires_grad]
    assert {SVDLinear4bit if four_bit else SVDLinear, AdaLoraModel} <= set(
        map(type, modules.values())
    )


@pytest.mark.parametrize("four_bit", [False, True])
def test_checkpoints_go_both_ways(tmp_path, four_bit, calls):
    stock, fused, inputs = pair(four_bit=four_bit)
    expected = logits(stock, inputs)
    for name, saved in (("stock", stock), ("fused", fused)):
        saved.save_pretrained(tmp_path / name)
        torch.manual_seed(0)
        base, _ = tiny_models.llama(1)
        if four_bit:
            tiny_models.quantize(base)
        loaded = PeftModel.from_pretrained(base, tmp_path / name)
        torch.testing.assert_close(logits(loaded.train(), inputs), expected)
        assert fusetune.fuse(loaded).stock == []
        calls.clear()
        torch.testing.assert_close(logits(loaded, inputs), expected)
        assert calls.count("lora_linear") == 7
    files = [
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("stock", "fused")
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize("four_bit", [False, True])
def test_disable_and_set_adapter(four_bit):
    stock, fused, inputs = pair(four_bit=four_bit)
    for model in (stock, fused):
        torch.manual_seed(1)
        config = AdaLoraConfig(
            init_r=2, total_step=9, target_modules=["q_proj"], inference_mode=True
        )
        model.add_adapter("second", config)
        with torch.no_grad():
            model.get_parameter(
                "base_model.model.model.layers.0.self_attn.q_proj.lora_E.second"
            ).fill_(50)
    seen = []
    for name in ("default", "second", "default"):
        for model in (stock, fused):
            model.set_adapter(name, inference_mode=name == "second")
        torch.testing.assert_close(logits(fused, inputs), logits(stock, inputs))
        seen.append(logits(fused, inputs))
        with fused.disable_adapter(), stock.disable_adapter():
            torch.testing.assert_close(logits(fused, inputs), logits(stock, inputs))
            assert not torch.allclose(logits(fused, inputs), seen[-1])
    assert not torch.allclose(seen[0], seen[1])
    # Two at once: PEFT's own forward, and the report says so.
    for model in (stock, fused):
        model.base_model.set_adapter(["default", "second"], inference_mode=True)
    torch.testing.assert_close(logits(fused, inputs), logits(stock, inputs))
    reasons = {row.reason for row in fusetune.fuse(fused).stock}
    assert reasons == {"2 active adapters"}


def test_merge_and_unmerge():
    stock, fused, inputs = pair()
    before = logits(fused, inputs)
    weight = fused.get_submodule(LAYER).base_layer.weight
    for model in (stock, fused):
        model.merge_adapter()
    assert torch.equal(weight, stock.get_submodule(LAYER).base_layer.weight)
    torch.testing.assert_close(logits(fused, inputs), logits(stock, inputs))
    assert {row.reason for row in fusetune.fuse(fused).stock} == {"the adapter is merged"}
    torch.testing.assert_close(logits(fused, inputs), before)
    for model in (stock, fused):
        model.unmerge_adapter()
    torch.testing.assert_close(logits(fused, inputs), before)
    merged, stock = fused.merge_and_unload(), stock.merge_and_unload()
    assert type(merged.model.layers[0].mlp.gate_proj) is nn.Linear
    torch.testing.assert_close(logits(merged, inputs), logits(stock, inputs))


def test_4bit_merge_is_refused_as_by_peft():
    for model in pair(four_bit=True)[:2]:
        with pytest.raises(NotImplementedError):
            model.merge_adapter()


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(four_bit, reentrant, calls):
    _, fused, inputs = pair(four_bit=four_bit, lora_dropout=0.3)
    expected = []
    for model in (fused, copy.deepcopy(fused)):
        if model is not fused:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        torch.manual_seed(5)
        calls.clear()
        expected.append(step(model, inputs))
        assert calls.count("lora_linear") == (7 if model is fused else 14)
    for name, value in expected[0].items():
        torch.testing.assert_close(expected[1][name], value)


@pytest.mark.parametrize("four_bit", [False, True])
def test_deepcopy_and_pickle(four_bit, calls):
    _, fused, inputs = pair(four_bit=four_bit)
    expected = logits(fused, inputs)
    clone = copy.deepcopy(fused)
    layer = pickle.loads(pickle.dumps(fused.get_submodule(LAYER)))
    x = torch.randn(2, 64)
    assert type(layer) in (FusedSVDLinear, FusedSVDLinear4bit)
    torch.testing.assert_close(layer(x), fused.get_submodule(LAYER)(x))
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    calls.clear()
    torch.testing.assert_close(logits(clone, inputs), expected)
    assert calls.count("lora_linear") == 7


def test_compiled_layer_is_one_graph(fresh_compiler):
    stock, fused, _ = pair()
    x = torch.randn(4, 64)
    compiled = torch.compile(fused.get_submodule(LAYER), backend="aot_eager", fullgraph=True)
    results = []
    for layer in (compiled, stock.get_submodule(LAYER)):
        given = x.clone().requires_grad_()
        y = layer(given)
        inside = fused.get_submodule(LAYER) if layer is compiled else layer
        leaves = [given, inside.lora_A["default"], inside.lora_E["default"]]
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for got, expected in zip(*results, strict=True):
        assert_same(got, expected)


def test_compiled_model_with_its_loss_is_one_graph(fresh_compiler):
    """Stock PEFT's regulariser breaks it."""
    stock, fused, inputs = pair()
    expected = step(fused, inputs)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    got = {n.removeprefix("_orig_mod."): value for n, value in step(compiled, inputs).items()}
    assert_near(got, expected, step(float64_copy(stock), inputs))


# --- what is not fused ----------------------------------------------------------------------------


def hooked(layer):
    layer.base_layer.register_forward_hook(lambda *_: None)


def other_dropout(layer):
    layer.lora_dropout["default"] = nn.Dropout1d(0.0)


def trained_base(layer):
    layer.base_layer.weight.requires_grad_()


def mixed_dtypes(layer):
    layer.lora_E["default"] = layer.lora_E["default"].double()
    layer.lora_A["default"] = layer.lora_A["default"].float()


def subclass(layer):
    class Sharded(nn.Parameter):
        pass

    layer.lora_B["default"] = Sharded(layer.lora_B["default"].detach())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "base_layer has hooks"),
        (other_dropout, "lora_dropout is a Dropout1d"),
        (trained_base, "the base weight is trained"),
        (mixed_dtypes, "the adapter is of torch.float32, torch.float64"),
        (subclass, "lora_B is a Sharded"),
    ],
)
def test_what_peft_has_to_do(change, reason, calls):
    stock, fused, _ = pair()
    for model in (stock, fused):
        change(model.get_submodule(LAYER))
    rows = [row for row in fusetune.fuse(fused).stock if row.module == LAYER]
    assert rows[0].reason.startswith(reason)
    x = torch.randn(3, 64)
    outcomes = []
    for model in (stock, fused):
        try:
            outcomes.append(model.get_submodule(LAYER)(x))
        except RuntimeError as error:  # PEFT's own, of mixed dtypes
            outcomes.append(str(error))
    if isinstance(outcomes[0], str):
        assert outcomes[0] == outcomes[1]
    else:
        assert torch.equal(*outcomes)
    assert calls == []


def test_transposed_and_8bit_layers_are_listed():
    model, _ = adalora("gpt2")
    reasons = {row.reason for row in fusetune.fuse(model).stock}
    assert reasons == {"base_layer is a Conv1D, not a plain Linear"}
    kind = type("SVDLinear8bitLt", (SVDLinear,), {"__module__": "peft.tuners.adalora.bnb"})
    model, _ = adalora()
    model.get_submodule(LAYER).__class__ = kind
    [row] = fusetune.fuse(model).stock
    assert (row.method, row.reason) == ("AdaLoRA", "adalora.SVDLinear8bitLt has no fused path")
