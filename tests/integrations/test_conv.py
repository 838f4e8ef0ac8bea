"""LoRA on convolutions: the adapter's second half and the sum in one op, the rest as PEFT's."""

import copy

import pytest
import tiny_models
import torch
from model_equality import assert_near
from peft import LoraConfig
from torch import nn

import fusetune

NAME = "default"
CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(6, 10, 3, padding=1), (2, 6, 11)),
    "2d": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1), (2, 6, 7, 8)),
    "2d kernel 1": (lambda: nn.Conv2d(6, 10, 1, bias=False), (2, 6, 5, 4)),
    "2d patches": (lambda: nn.Conv2d(3, 16, 4, stride=4), (2, 3, 8, 8)),
    "2d same, reflected": (
        lambda: nn.Conv2d(6, 10, 3, padding="same", padding_mode="reflect"),
        (2, 6, 7, 8),
    ),
    "3d": (lambda: nn.Conv3d(3, 5, 2), (1, 3, 4, 5, 6)),
}


def pair(make=CONVOLUTIONS["2d"][0], dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(make()).to(dtype)
    stock = tiny_models.with_lora(model, target_modules=["0"], **options)
    fused = copy.deepcopy(stock)
    fusetune.fuse(fused)
    return stock, fused


def layer(model):
    return model.base_model.model[0]


def results(model, x, seed=0):
    leaf = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = model(leaf)
    y.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": leaf.grad, **grads}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}], ids=str)
def test_values_and_gradients_are_pefts(kind, dtype, options, calls):
    make, shape = CONVOLUTIONS[kind]
    stock, fused = pair(make, dtype, **options)
    assert fusetune.fuse(fused).stock == []
    x = torch.randn(shape).to(dtype)
    got, eager = results(fused, x), results(stock, x)
    assert got["y"].stride() == eager["y"].stride()
    assert_near(got, eager, results(copy.deepcopy(stock).double(), x.double()))
    assert calls == ["lora_up"]


def test_dropout_is_pefts_own(calls):
    stock, fused = pair(lora_dropout=0.3)
    x = torch.randn(CONVOLUTIONS["2d"][1])
    torch.testing.assert_close(results(fused, x), results(stock, x))
    assert not torch.equal(results(fused, x)["y"], results(fused, x, seed=1)["y"])
    assert calls == ["lora_up"] * 3


@pytest.mark.parametrize("grad", [False, True])
def test_channels_last_and_a_trained_base(grad, calls):
    """The base layer is called, so it may be trained."""
    stock, fused = pair()
    x = torch.randn(CONVOLUTIONS["2d"][1]).contiguous(memory_format=torch.channels_last)
    for model in (stock, fused):
        model.to(memory_format=torch.channels_last)
        layer(model).base_layer.weight.requires_grad_(grad)
    got, expected = results(fused, x), results(stock, x)
    torch.testing.assert_close(got, expected)
    assert any("base_layer.weight" in name for name in got) == grad
    with torch.no_grad():
        torch.testing.assert_close(fused(x), stock(x))
    assert calls == ["lora_up"] * 2


def test_vit_with_an_adapted_patch_embedding(calls):
    torch.manual_seed(0)
    model, inputs = tiny_models.vit()
    stock = tiny_models.with_lora(model, target_modules=["projection", "q_proj"])
    fused = copy.deepcopy(stock)
    report = fusetune.fuse(fused)
    assert report.stock == []
    loss, logits, grads = tiny_models.loss_and_grads(fused, inputs)
    torch.testing.assert_close((loss, logits, grads), tiny_models.loss_and_grads(stock, inputs))
    assert calls.count("lora_up") == 1


def test_lora_A_with_a_hook_is_called(calls):
    stock, fused = pair()
    for model in (stock, fused):
        layer(model).lora_A[NAME].register_forward_hook(lambda module, args, output: output * 2)
    x = torch.randn(CONVOLUTIONS["2d"][1])
    torch.testing.assert_close(fused(x), stock(x))
    assert calls == ["lora_up"]


# --- guards ---------------------------------------------------------------------------------------


def hook_on_base(model):
    layer(model).base_layer.register_forward_hook(lambda module, args, output: output * 2)


def hook_on_lora_B(model):
    layer(model).lora_B[NAME].register_forward_hook(lambda module, args, output: output * 2)


def subclass_of_base(model):
    class Other(nn.Conv2d):
        pass

    layer(model).base_layer.__class__ = Other


def wide_lora_B(model):
    wide = nn.Conv2d(4, 10, 3, padding=1)
    wide.load_state_dict({"weight": torch.ones(10, 4, 3, 3), "bias": torch.ones(10)})
    layer(model).lora_B[NAME] = wide


def float64_lora_B(model):
    layer(model).lora_B[NAME].double()
    layer(model).lora_A[NAME].double()


def disabled(model):
    model.base_model.disable_adapter_layers()


def merged(model):
    model.base_model.merge_adapter()


def second(model, **options):
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **options)
    model.add_adapter("second", config)


def two_active_adapters(model):
    second(model)
    model.base_model.set_adapter([NAME, "second"])


def dora(model):
    second(model, use_dora=True)
    model.set_adapter("second")


@pytest.mark.parametrize(
    ("tamper", "why"),
    [
        (hook_on_base, "base_layer has hooks"),
        (hook_on_lora_B, "lora_B has hooks"),
        (subclass_of_base, "base_layer is a Other, not a plain convolution"),
        (wide_lora_B, "lora_B is no convolution of kernel 1"),
        (float64_lora_B, "lora_B is torch.float64"),
        (disabled, "adapters are disabled"),
        (merged, "the adapter is merged"),
        (two_active_adapters, "2 active adapters"),
        (dora, "DoraConv2dVariant is not fused"),
    ],
)
def test_what_is_left_to_peft(tamper, why, calls):
    stock, fused = pair()
    tamper(stock)
    tamper(fused)
    x = torch.randn(CONVOLUTIONS["2d"][1])
    assert torch.equal(fused(x), stock(x))
    assert calls == []
    assert why in fusetune.fuse(fused).stock[0].reason


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_groups_and_dilation_are_left_to_peft(calls):
    stock, fused = pair(lambda: nn.Conv2d(6, 10, 3, groups=2))
    x = torch.randn(2, 6, 5, 5)
    assert torch.equal(fused(x), stock(x))
    assert fusetune.fuse(fused).stock[0].reason == "the base layer has groups"
    stock, fused = pair(lambda: nn.Conv2d(6, 10, 2, dilation=2))
    for model in (stock, fused):  # PEFT's adapter has no dilation: its result has another size
        with pytest.raises(RuntimeError, match="size"):
            model(x)
    assert "geometry" in fusetune.fuse(fused).stock[0].reason
    assert calls == []


def test_a_single_sample_without_a_batch(calls):
    stock, fused = pair()
    x = torch.randn(CONVOLUTIONS["2d"][1])[0]
    assert torch.equal(fused(x), stock(x))
    assert calls == []


def test_lifecycle(calls):
    stock, fused = pair()
    x = torch.randn(CONVOLUTIONS["2d"][1])
    expected = stock(x)
    assert list(fused.state_dict()) == list(stock.state_dict())
    torch.testing.assert_close(copy.deepcopy(fused)(x), expected)
    with fused.disable_adapter(), stock.disable_adapter():
        assert torch.equal(fused(x), stock(x))
    fused.merge_adapter()
    torch.testing.assert_close(fused(x), expected)
    fused.unmerge_adapter()
    plain = fused.merge_and_unload()
    torch.testing.assert_close(plain(x), expected)
    assert calls == ["lora_up"]


def test_autocast(calls):
    stock, fused = pair()
    x = torch.randn(CONVOLUTIONS["2d"][1])
    with torch.autocast("cpu", torch.bfloat16):
        got, eager = results(fused, x), results(stock, x)
    assert_near(got, eager, results(copy.deepcopy(stock).double(), x.double()))
    assert calls == ["lora_up"]


def test_compiled(fresh_compiler):
    _, fused = pair()
    x = torch.randn(CONVOLUTIONS["2d"][1])
    compiled = torch.compile(layer(fused), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(fused)(x))
