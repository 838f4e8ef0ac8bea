"""What a fused layer may not bypass: then the stock forward runs, and the reason is told."""

import copy

import bitsandbytes as bnb
import pytest
import tiny_models
import torch
from peft import LoraConfig
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.nn.utils import parametrize

import fusetune

PATH = "base_model.model.model.layers.0.mlp.gate_proj"
NAME = "default"


def pair(*, four_bit=False, **options):
    """(stock model, fused copy), in training mode, each with the layer that is tampered with."""
    stock, _ = tiny_models.lora_llama(layers=1, four_bit=four_bit, **options)
    fused = copy.deepcopy(stock)
    fusetune.fuse(fused)
    return stock, fused


def reason(fused):
    rows = {row.module: row for row in fusetune.fuse(fused).rows}
    return rows[PATH].reason


def assert_stock(stock, fused, calls, *args, dtype=torch.float32, **kwargs):
    """The layer gives what the stock layer does, to the bit, without a fused LoRA."""
    x = torch.randn(3, 64, dtype=dtype)
    expected = stock.get_submodule(PATH)(x, *args, **kwargs)
    assert torch.equal(fused.get_submodule(PATH)(x, *args, **kwargs), expected)
    assert not {"lora_linear", "dora_linear"} & set(calls)


def double_output(module, args, output):
    return output * 2


# --- tampering that is visible in the report ----------------------------------------------------


def hook_on_base(model):
    layer(model).base_layer.register_forward_hook(double_output)


def hook_on_lora_A(model):
    layer(model).lora_A[NAME].register_forward_hook(double_output)


def hook_on_lora_B(model):
    layer(model).lora_B[NAME].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def hook_on_dropout(model):
    layer(model).lora_dropout[NAME].register_forward_hook(double_output)


def backward_hook_on_lora_A(model):
    layer(model).lora_A[NAME].register_full_backward_hook(lambda module, gin, gout: None)


def own_forward_of_base(model):
    base = layer(model).base_layer
    base.forward = lambda x: nn.functional.linear(x, base.weight) + 1


def accelerate_hook(model):
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(layer(model).lora_A[NAME], ModelHook())


def parametrized_base(model):
    class Halve(nn.Module):
        def forward(self, weight):
            return weight / 2

    parametrize.register_parametrization(layer(model).base_layer, "weight", Halve())


def weight_norm_of_lora_A(model):
    nn.utils.parametrizations.weight_norm(layer(model).lora_A[NAME])


def subclass_of_lora_A(model):
    class Unit(nn.Linear):
        pass

    layer(model).lora_A[NAME].__class__ = Unit


def subclass_of_base_weight(model):
    class Tagged(nn.Parameter):
        pass

    base = layer(model).base_layer
    base.weight = Tagged(base.weight.data, requires_grad=False)


def partitioned_weight(model):
    layer(model).lora_A[NAME].weight.ds_id = 3


def trained_base(model):
    layer(model).base_layer.weight.requires_grad_(True)


def other_dropout(model):
    layer(model).lora_dropout[NAME] = nn.AlphaDropout(0.0)


def bias_of_lora_A(model):
    layer(model).lora_A[NAME].bias = nn.Parameter(torch.ones(4))


def float64_adapter(model):
    layer(model).lora_A[NAME].double()
    layer(model).lora_B[NAME].double()


def disabled(model):
    model.base_model.disable_adapter_layers()


def merged(model):
    model.base_model.merge_adapter()


def a_dora_beside_another(model):
    dora(model)
    model.base_model.set_adapter([NAME, "second"])


def adapters_of_two_dtypes(model):
    add_second(model)
    layer(model).lora_A["second"].bfloat16()
    layer(model).lora_B["second"].bfloat16()
    model.base_model.set_adapter([NAME, "second"])


def hook_on_one_of_two(model):
    add_second(model)
    layer(model).lora_B["second"].register_forward_hook(double_output)
    model.base_model.set_adapter([NAME, "second"])


def adapter_of_other_layers(model):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model.add_adapter("second", config)
    model.set_adapter("second")


def another_variant(model):
    class Variant:
        @staticmethod
        def forward(module, active_adapter, x, result, **kwargs):
            return result + 1

    layer(model).lora_variant[NAME] = Variant()


def hook_on_magnitude(model):
    dora(model)
    vector = layer(model).lora_magnitude_vector["second"]
    vector.register_forward_hook(double_output)


def dora_with_a_bias_of_lora_B(model):
    dora(model)
    layer(model).lora_B["second"].bias = nn.Parameter(torch.ones(128))


def dora(model):
    config = LoraConfig(r=2, target_modules=["gate_proj"], use_dora=True, init_lora_weights=False)
    torch.manual_seed(1)
    model.add_adapter("second", config)
    model.set_adapter("second")


def add_second(model):
    config = LoraConfig(r=2, target_modules=["gate_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    model.add_adapter("second", config)


def layer(model):
    return model.get_submodule(PATH)


BOTH = [
    (hook_on_base, "base_layer has hooks"),
    (hook_on_lora_A, "lora_A has hooks"),
    (hook_on_lora_B, "lora_B has hooks"),
    (hook_on_dropout, "lora_dropout has hooks"),
    (backward_hook_on_lora_A, "lora_A has hooks"),
    (accelerate_hook, "lora_A has a forward of its own"),
    (weight_norm_of_lora_A, "lora_A is a ParametrizedLinear"),
    (subclass_of_lora_A, "lora_A is a Unit"),
    (partitioned_weight, "lora_A is partitioned by DeepSpeed"),
    (other_dropout, "lora_dropout is a AlphaDropout"),
    (bias_of_lora_A, "lora_A has a bias"),
    (float64_adapter, "lora_A is torch.float64"),
    (disabled, "adapters are disabled"),
    (merged, "the adapter is merged"),
    (a_dora_beside_another, "2 adapters, and second is a DoRA"),
    (adapters_of_two_dtypes, "2 adapters of different dtypes"),
    (hook_on_one_of_two, "2 adapters, and of second: lora_B has hooks"),
    (adapter_of_other_layers, "no active adapter"),
    (another_variant, "Variant is not fused"),
    (hook_on_magnitude, "lora_magnitude_vector has hooks"),
    (dora_with_a_bias_of_lora_B, "lora_B has a bias beside DoRA"),
]
DENSE = [
    (own_forward_of_base, "base_layer has a forward of its own"),
    (parametrized_base, "base_layer is a ParametrizedLinear"),
    (subclass_of_base_weight, "the weight of base_layer is not a plain parameter but Tagged"),
    (trained_base, "the base weight is trained"),
]


@pytest.mark.parametrize(
    ("tamper", "why"), [*BOTH, *DENSE], ids=lambda v: getattr(v, "__name__", "")
)
def test_dense_layer(tamper, why, calls):
    stock, fused = pair()
    tamper(stock)
    tamper(fused)
    dtype = torch.float32
    assert_stock(stock, fused, calls, dtype=dtype)
    assert why in reason(fused)


@pytest.mark.filterwarnings("ignore:.*[mM]erge lora module to 4-bit")
@pytest.mark.parametrize(("tamper", "why"), BOTH, ids=lambda v: getattr(v, "__name__", ""))
def test_4bit_layer(tamper, why, calls):
    stock, fused = pair(four_bit=True)
    tamper(stock)
    tamper(fused)
    x = torch.randn(3, 64, requires_grad=True)  # without, bitsandbytes may compute in bf16
    expected = stock.get_submodule(PATH)(x)
    torch.testing.assert_close(fused.get_submodule(PATH)(x), expected)
    # PEFT's forward, over a base layer that is fused still.
    assert calls == ["linear_4bit"]
    assert why in reason(fused)


def test_4bit_base_that_is_not_fused(calls):
    stock, fused = pair(four_bit=True)
    fused.get_submodule(PATH).base_layer.__class__ = bnb.nn.Linear4bit
    x = torch.randn(3, 64, requires_grad=True)
    assert torch.equal(fused.get_submodule(PATH)(x), stock.get_submodule(PATH)(x))
    assert calls == []


def test_undoing_each_cause_fuses_again(calls):
    stock, fused = pair()
    x = torch.randn(3, 64)
    expected = stock.get_submodule(PATH)(x)
    handle = fused.get_submodule(PATH).base_layer.register_forward_hook(double_output)
    handle.remove()
    with fused.disable_adapter():
        pass
    fused.base_model.merge_adapter()
    fused.base_model.unmerge_adapter()
    add_second(fused)
    fused.base_model.set_adapter([NAME, "second"])
    fused.set_adapter(NAME)
    torch.testing.assert_close(fused.get_submodule(PATH)(x), expected)
    assert calls == ["lora_linear"]
    assert reason(fused) is None


# --- causes that lie in the call ------------------------------------------------------------------


@pytest.mark.parametrize("four_bit", [False, True])
def test_mixed_batch(four_bit, calls):
    stock, fused = pair(four_bit=four_bit)
    for model in (stock, fused):
        add_second(model)
    x = torch.randn(3, 64, requires_grad=True)
    names = {"adapter_names": [NAME, "second", "__base__"]}
    expected = stock.get_submodule(PATH)(x, **names)
    torch.testing.assert_close(fused.get_submodule(PATH)(x, **names), expected)
    assert calls == ["multi_lora_linear"]
    stock.eval(), fused.eval()
    ids = torch.randint(1, tiny_models.VOCABULARY, (3, 5))
    with torch.no_grad():
        got = fused(input_ids=ids, **names).logits
        exact = stock(input_ids=ids, **names).logits
    tolerance = 0.05 if four_bit else 1e-5  # bitsandbytes' own inference is in bf16 on some CPUs
    torch.testing.assert_close(got, exact, atol=tolerance, rtol=tolerance)


def test_input_of_another_dtype_fails_as_in_peft(calls):
    stock, fused = pair()
    for model in (stock, fused):
        with pytest.raises(RuntimeError, match="dtype"):
            model.get_submodule(PATH)(torch.randn(3, 64, dtype=torch.float64))


def test_float64_model_is_left_to_peft(calls):
    """There is no float64 kernel, and PEFT's code is faster than the reference."""
    stock, fused = pair(dtype=torch.float64)
    assert_stock(stock, fused, calls, dtype=torch.float64)
    assert "float64" in reason(fused)


@pytest.mark.parametrize("four_bit", [False, True])
def test_without_a_kernel_the_stock_code_runs(four_bit, calls, monkeypatch):
    """The reference is slower than PEFT's own code: it only runs where it is asked for."""
    for op in fusetune.ops.OPS.values():
        monkeypatch.setattr(op, "impls", op.impls[-1:])
        monkeypatch.setattr(op, "_chosen", {})
        monkeypatch.setattr(op, "_names", {})
    with fusetune.ops.use_backend("auto"):
        stock, fused = pair(four_bit=four_bit)
        x = torch.randn(3, 64, requires_grad=True)
        assert torch.equal(fused.get_submodule(PATH)(x), stock.get_submodule(PATH)(x))
        assert calls == []
        assert "no kernel for this model" in reason(fused)
    with fusetune.ops.use_backend("reference"):
        fused.get_submodule(PATH)(x)
        assert calls == ["lora_linear"]


def test_input_casting_switched_off(calls):
    stock, fused = pair(dtype=torch.bfloat16)  # the adapter is fp32
    for model in (stock, fused):
        with (
            disable_input_dtype_casting(model),
            pytest.raises(RuntimeError, match="dtype"),
        ):
            model.get_submodule(PATH)(torch.randn(3, 64, dtype=torch.bfloat16))
    assert calls == []


def test_hook_on_every_module(calls):
    stock, fused = pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(type(module))
    )
    try:
        assert_stock(stock, fused, calls)
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 6


def test_tensor_subclass(calls):
    stock, fused = pair()

    class Traced(torch.Tensor):
        pass

    x = torch.randn(3, 64).as_subclass(Traced)
    assert torch.equal(fused.get_submodule(PATH)(x), stock.get_submodule(PATH)(x))
    assert calls == []


def test_function_transforms(calls):
    stock, fused = pair()
    x = torch.randn(5, 3, 64)
    expected = stock.get_submodule(PATH)(x)
    torch.testing.assert_close(torch.vmap(fused.get_submodule(PATH))(x), expected)
    gradient = torch.func.grad(lambda v: fused.get_submodule(PATH)(v).sum())(x)
    true = torch.func.grad(lambda v: stock.get_submodule(PATH)(v).sum())(x)
    torch.testing.assert_close(gradient, true)
    tangent = torch.randn_like(x)
    _, derivative = torch.func.jvp(fused.get_submodule(PATH), (x,), (tangent,))
    _, true = torch.func.jvp(stock.get_submodule(PATH), (x,), (tangent,))
    torch.testing.assert_close(derivative, true)
    assert calls == []


def test_forward_mode_differentiation(calls):
    _, fused = pair()
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.randn(3, 64), torch.ones(3, 64))
        y = fused.get_submodule(PATH)(x)
        assert torch.autograd.forward_ad.unpack_dual(y).tangent is not None
    assert calls == []


def test_jit_trace(calls):
    stock, fused = pair()
    x = torch.randn(3, 64)
    with torch.no_grad():
        traced = torch.jit.trace(fused.get_submodule(PATH), (x,))
        other = torch.randn(3, 64)
        torch.testing.assert_close(traced(other), stock.get_submodule(PATH)(other))


def test_functional_call_sees_the_given_parameters(calls):
    stock, fused = pair()
    given = {
        name: torch.randn_like(value)
        for name, value in fused.get_submodule(PATH).named_parameters()
        if "lora_" in name
    }
    x = torch.randn(3, 64)
    got = torch.func.functional_call(fused.get_submodule(PATH), given, (x,))
    expected = torch.func.functional_call(stock.get_submodule(PATH), given, (x,))
    torch.testing.assert_close(got, expected)
