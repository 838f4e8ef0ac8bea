"""Which experts are left to PEFT, and what PEFT and torch do with those that are fused."""

import copy

import pytest
import tiny_models
import torch
from expert_models import (
    IMPLEMENTATIONS,
    NAME,
    OP,
    WEIGHTS,
    adapted,
    double,
    exact,
    inputs,
    layer,
    mixtral_config,
    pair,
    results,
)
from model_equality import assert_near, step
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import MixtralForCausalLM
from transformers.integrations import moe
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import fusetune
from fusetune.integrations.peft_experts import FusedParamWrapper


def hook_on_experts(model):
    experts = layer(model).get_base_layer()
    experts.register_forward_hook(lambda module, args, output: output * 2)


def hook_on_inner_wrapper(model):
    layer(model).base_layer.register_forward_hook(lambda module, args, output: output * 2)


def unknown_implementation(model):
    moe.ALL_EXPERTS_FUNCTIONS.register("of_a_user", moe.batched_mm_experts_forward)
    layer(model).get_base_layer().config._experts_implementation = "of_a_user"


def trained_weight(model):
    layer(model).get_base_layer().down_proj.requires_grad_(True)


def tagged_weight(model):
    class Tagged(nn.Parameter):
        pass

    experts = layer(model).get_base_layer()
    experts.down_proj = Tagged(experts.down_proj.data, requires_grad=False)


def subclass_of_experts(model):
    class Other(MixtralExperts):
        def forward(self, *args):
            return super().forward(*args) * 2

    layer(model).get_base_layer().__class__ = Other


def disabled(model):
    model.base_model.disable_adapter_layers()


def merged(model):
    model.base_model.merge_adapter()


def float64_adapter(model):
    layer(model).lora_A[NAME].double()
    layer(model).lora_B[NAME].double()


def two_active_adapters(model):
    torch.manual_seed(1)
    config = LoraConfig(
        r=2, target_modules=[], target_parameters=list(WEIGHTS), init_lora_weights=False
    )
    model.add_adapter("second", config)
    model.base_model.set_adapter([NAME, "second"])


@pytest.mark.parametrize(
    ("tamper", "why"),
    [
        (hook_on_experts, "the experts has hooks"),
        (hook_on_inner_wrapper, "base_layer has hooks"),
        (unknown_implementation, "the experts' implementation 'of_a_user' is not known"),
        (trained_weight, "down_proj is trained"),
        (tagged_weight, "down_proj is not a plain parameter but Tagged"),
        (subclass_of_experts, "the base layer is a Other, not one of transformers' experts"),
        (disabled, "adapters are disabled"),
        (merged, "the adapter is merged"),
        (float64_adapter, "lora_A is torch.float64"),
        (two_active_adapters, "2 active adapters"),
    ],
)
def test_what_is_left_to_peft(tamper, why, calls):
    stock, fused = pair()
    tamper(stock)
    tamper(fused)
    given = inputs()
    assert torch.equal(fused(*given), stock(*given))
    assert calls == []
    assert why in fusetune.fuse(fused).stock[0].reason
    moe.ALL_EXPERTS_FUNCTIONS._global_mapping.pop("of_a_user", None)


def test_a_function_registered_in_a_known_ones_place(calls):
    stock, fused = pair()
    moe.ALL_EXPERTS_FUNCTIONS["grouped_mm"] = moe.batched_mm_experts_forward
    try:
        given = inputs()
        assert torch.equal(fused(*given), stock(*given))
        assert "'grouped_mm' is not known" in fusetune.fuse(fused).stock[0].reason
    finally:
        del moe.ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    assert calls == []
    assert fusetune.fuse(fused).stock == []


def test_4bit_experts_are_left_to_peft():
    """bitsandbytes' parameter holds codes, not a stack of matrices."""
    from bitsandbytes.nn import Params4bit

    _, fused = pair()
    experts = layer(fused).get_base_layer()
    del experts.down_proj
    experts.down_proj = Params4bit(torch.randn(8, 8), requires_grad=False)
    [row] = fusetune.fuse(fused).stock
    assert row.reason == "down_proj is not a plain parameter but Params4bit"


def test_wrapped_parameters_of_other_modules_are_left_to_peft(calls):
    torch.manual_seed(0)
    stock = adapted(nn.Sequential(nn.Linear(6, 6)), ["0.weight"])
    fused = copy.deepcopy(stock)
    [row] = fusetune.fuse(fused).stock
    assert row.reason == "the base layer is a Linear, not one of transformers' experts"
    x = torch.randn(3, 6)
    assert torch.equal(fused(x), stock(x))
    assert calls == []


def test_another_kind_of_call_and_another_dtype(calls):
    stock, fused = pair(implementation="eager")
    x, index, weights = inputs()
    named = {"top_k_index": index, "top_k_weights": weights}
    torch.testing.assert_close(fused(x, **named), stock(x, **named))
    assert calls.count(OP) == 2
    for model in (stock, fused):
        with pytest.raises(TypeError):
            model(x, index)
        with pytest.raises(RuntimeError, match="dtype"):
            model(x.double(), index, weights)
        with pytest.raises(ValueError, match="mixed"):
            layer(model)(x, index, weights, adapter_names=[NAME] * len(x))
    assert calls.count(OP) == 2


# --- what PEFT and torch do with the layer --------------------------------------------------------


def test_lifecycle(tmp_path):
    stock, fused = pair()
    given = inputs()
    expected = stock(*given)
    assert type(layer(fused)) is type(layer(fused).base_layer) is FusedParamWrapper
    assert list(fused.state_dict()) == list(stock.state_dict())
    torch.testing.assert_close(copy.deepcopy(fused)(*given), expected)
    with fused.disable_adapter(), stock.disable_adapter():
        assert torch.equal(fused(*given), stock(*given))
    fused.merge_adapter()
    torch.testing.assert_close(fused(*given), expected)
    fused.unmerge_adapter()
    torch.testing.assert_close(fused(*given), expected)
    fusetune.unfuse(fused)
    assert type(layer(fused)) is type(layer(fused).base_layer) is ParamWrapper
    fusetune.fuse(fused)
    plain = fused.merge_and_unload()
    assert type(plain.experts) is MixtralExperts
    torch.testing.assert_close(plain(*given), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast(implementation, calls):
    stock, fused = pair(implementation=implementation)
    given = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        got, eager = results(fused, *given), results(stock, *given)
    assert_near(got, eager, double(stock, *given))
    assert calls.count(OP) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, calls):
    torch.manual_seed(0)
    stock = adapted(
        MixtralForCausalLM(mixtral_config()), ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    fused = copy.deepcopy(stock)
    fusetune.fuse(fused)
    for model in (stock, fused):
        options = {"use_reentrant": reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
        model.train()
    given = tiny_models.token_inputs()
    assert_near(step(fused, given), step(stock, given), step(exact(stock), given))
    assert calls.count(OP) == 4


def test_compiled(fresh_compiler):
    _, fused = pair()
    given = inputs()
    compiled = torch.compile(layer(fused), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), fused(*given))
