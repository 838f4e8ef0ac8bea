"""The fused activation of gated MLPs: the same numbers, on the MLPs it is for, and reversible."""

import copy
import importlib
import pickle
import types

import pytest
import tiny_models
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

import fusetune
from fusetune.integrations import transformers_mlp
from fusetune.integrations._stock_forward import has_forward

SIZES = {"hidden_size": 32, "intermediate_size": 40}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3", "granite", "deepseek_v3")
WITH_GELU = {
    "gemma": "gelu_pytorch_tanh",
    "gemma2": "gelu_pytorch_tanh",
    "gemma3": "gelu_pytorch_tanh",
    "llama": "gelu",
    "mistral": "gelu_new",
    "qwen2": "gelu_python",
}
JOINED = ("phi3", "glm")  # one projection for gate and up


def mlp(family="llama", **options):
    """One MLP of a family, by its own config."""
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    [name] = [name for name in vars(modeling) if name.lower() == family.replace("_", "") + "mlp"]
    config = getattr(modeling, name.removesuffix("MLP") + "Config")(**SIZES, **options)
    return nn.ModuleList([getattr(modeling, name)(config)])


def step(module, x):
    x = x.clone().requires_grad_()
    y = module(x)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    parameters = [module.get_parameter(name) for name in names]
    return y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])


def rows(model):
    return [row for row in fusetune.fuse(model).rows if row.method in ("swiglu", "geglu")]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_step_in_every_family(family, calls):
    model = mlp(family)
    x = torch.randn(2, 5, 32)
    expected = step(model[0], x)
    [row] = rows(model)
    assert row.fused
    torch.testing.assert_close(step(model[0], x), expected)
    assert calls == ["glu"]


@pytest.mark.parametrize(("family", "activation"), WITH_GELU.items())
def test_gelu(family, activation, calls):
    """Both GELUs by all of their names, in the families that have them and in others."""
    key = "hidden_activation" if family.startswith("gemma") else "hidden_act"
    model = mlp(family, **{key: activation})
    x = torch.randn(2, 5, 32)
    expected = step(model[0], x)
    [row] = rows(model)
    assert row.fused
    assert row.method == "geglu"
    torch.testing.assert_close(step(model[0], x), expected)
    assert calls == ["glu"]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_torch_s_own_gelu(approximate, calls):
    model, x = mlp(), torch.randn(3, 32)
    model[0].act_fn = nn.GELU(approximate)
    expected = step(model[0], x)
    assert rows(model)[0].method == "geglu"
    torch.testing.assert_close(step(model[0], x), expected)
    assert calls == ["glu"]


@pytest.mark.parametrize("family", JOINED)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gate_and_up_in_one_projection(family, activation, calls):
    model = mlp(family, hidden_act=activation)
    x = torch.randn(2, 5, 32)
    expected = step(model[0], x)
    [row] = rows(model)
    assert row.fused
    assert row.method == ("swiglu" if activation == "silu" else "geglu")
    torch.testing.assert_close(step(model[0], x), expected)
    torch.testing.assert_close(model[0](hidden_states=x), expected[0])
    assert calls == ["glu", "glu"]


def test_a_model_s_loss_and_gradients(calls):
    model, inputs = tiny_models.llama()
    expected = tiny_models.loss_and_grads(copy.deepcopy(model), inputs)
    assert [row.module for row in rows(model)] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    got = tiny_models.loss_and_grads(model, inputs)
    others = ("rms_norm", "rotary")
    assert [name for name in calls if name not in others] == ["glu", "glu", "cross_entropy"]
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("four_bit", [False, True])
def test_projections_with_adapters_are_called(four_bit, calls):
    model, inputs = tiny_models.lora_llama(layers=1, four_bit=four_bit)
    expected = tiny_models.loss_and_grads(model, inputs)
    assert fusetune.fuse(model).stock == []
    got = tiny_models.loss_and_grads(model, inputs)
    assert calls.count("glu") == 1
    assert calls.count("lora_linear") == 7
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_hooks_on_projections_and_on_the_mlp_are_called(calls):
    model, x, seen = mlp(), torch.randn(2, 32), []
    fusetune.fuse(model)
    for name, module in model[0].named_modules():
        if name != "act_fn":
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    model[0](x)
    assert seen == ["gate_proj", "up_proj", "down_proj", ""]
    assert calls == ["glu"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.act_fn.register_forward_hook(lambda *_: None), "act_fn has hooks"),
        (
            lambda m: setattr(m, "act_fn", nn.Tanh()),
            "act_fn is a Tanh, which no kernel computes",
        ),
        (lambda m: setattr(m.act_fn, "forward", torch.tanh), "act_fn has a forward of its own"),
    ],
    ids=["hook", "another", "replaced"],
)
def test_what_hangs_on_the_activation_is_respected(change, reason, calls):
    model, x = mlp(), torch.randn(3, 32)
    stock = copy.deepcopy(model)
    report = fusetune.fuse(model)
    change(model[0]), change(stock[0])
    [row] = report.refresh().rows
    assert row.reason == reason
    assert torch.equal(model[0](x), stock[0](x))
    assert calls == []


def test_other_activations_and_forwards_are_left_alone():
    class Own(LlamaMLP):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    relu = mlp(hidden_act="relu")
    own = nn.ModuleList([Own(mlp()[0].config)])
    for model in (relu, own):
        kind = type(model[0])
        assert fusetune.fuse(model).rows == []
        assert type(model[0]) is kind


def test_a_forward_that_differs_is_not_the_stock_one(monkeypatch):
    def swapped(self, x):
        down_proj = self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))
        return down_proj

    known = transformers_mlp._Separate._known_forward
    assert has_forward(LlamaMLP, known)
    monkeypatch.setattr(LlamaMLP, "forward", swapped)
    assert not has_forward(LlamaMLP, known)


def test_half_precision_and_float64(calls):
    model, x = mlp(), torch.randn(4, 32)
    fusetune.fuse(model)
    for dtype, fused in ((torch.bfloat16, True), (torch.float16, True), (torch.float64, False)):
        stock = copy.deepcopy(model).to(dtype)
        fusetune.unfuse(stock)
        calls.clear()
        got = copy.deepcopy(model).to(dtype)[0](x.to(dtype))
        assert bool(calls) == fused
        expected = stock[0](x.to(dtype))
        assert got.dtype == dtype
        allowed = 4 * torch.finfo(dtype).eps * expected.abs().max()  # two roundings each, and sums
        assert (got - expected).abs().max() <= allowed


def test_fuse_and_unfuse_leave_no_trace():
    model = mlp()
    before = {name: (type(m), dict(m.__dict__)) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    fusetune.fuse(model)
    assert isinstance(model[0], LlamaMLP)
    assert type(model[0]) is not LlamaMLP
    assert list(model.state_dict()) == keys
    fusetune.fuse(model)
    fusetune.unfuse(model)
    for name, module in model.named_modules():
        assert (type(module), module.__dict__) == before[name]
    with fusetune.fused(model):
        assert type(model[0]) is not LlamaMLP
    assert type(model[0]) is LlamaMLP


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_fused_and_independent(copied, calls):
    model, x = mlp(), torch.randn(3, 32)
    fusetune.fuse(model)
    expected = model[0](x)
    clone = copied(model)
    with torch.no_grad():
        model[0].gate_proj.weight.zero_()
    calls.clear()
    assert torch.equal(clone[0](x), expected)
    assert calls == ["glu"]
    fusetune.unfuse(clone)
    assert type(clone[0]) is LlamaMLP


def test_checkpointing_recomputes_it(calls):
    model, inputs = tiny_models.llama()
    model.train()
    expected = tiny_models.loss_and_grads(model, inputs)
    fusetune.fuse(model)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        calls.clear()
        got = tiny_models.loss_and_grads(model, inputs)
        assert calls.count("glu") == 4
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_a_dtype_without_a_kernel_is_reported():
    found = rows(mlp().double())
    assert found
    assert all("float64" in row.reason for row in found)


# --- beside Liger, which puts its forwards into instances or its classes into transformers --------


def liger(name="LigerSwiGLUMLP"):
    """A stand-in: the library needs a GPU."""

    def forward(self, x):
        return self.down_proj(torch.tanh(self.gate_proj(x)) * self.up_proj(x))

    forward.__module__ = "liger_kernel.transformers.swiglu"
    return type(name, (nn.Module,), {"forward": forward, "__module__": forward.__module__})


@pytest.mark.parametrize("first", ["liger", "fuse"])
def test_a_forward_of_liger_s_is_left_and_reported(first, calls):
    model, x = mlp(), torch.randn(3, 32)
    if first == "fuse":
        fusetune.fuse(model)
    module = model[0]
    module.forward = types.MethodType(liger().forward, module)
    expected = module(x)
    [row] = rows(model)
    assert not row.fused
    assert row.reason == "Liger computes it: its forward was replaced"
    assert torch.equal(module(x), expected)
    assert calls == []


@pytest.mark.parametrize(
    ("name", "method"), [("LigerSwiGLUMLP", "swiglu"), ("LigerGEGLUMLP", "geglu")]
)
def test_a_class_of_liger_s_is_left_and_reported(name, method):
    module = mlp()[0]
    module.__class__ = type(name, (liger(name),), {"__module__": "liger_kernel.transformers.geglu"})
    [row] = fusetune.fuse(nn.ModuleList([module])).rows
    assert (row.method, row.reason) == (method, f"Liger computes it: {name}")
    assert type(module).__name__ == name
