"""LoRA on the stacked weights of experts: tokens pass through the factors, no stack is folded."""

import copy

import pytest
import tiny_models
import torch
from model_equality import assert_near, float64_copy, step
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GptOssConfig,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.integrations import moe
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

import fusetune
from fusetune.integrations import peft_experts
from fusetune.integrations.peft_experts import FusedParamWrapper

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
EXPERTS, HIDDEN, INNER = 4, 32, 24
NAME = "default"
OP = "lora_grouped_linear"


class Block(nn.Module):
    """Experts alone, called as a model's block calls them."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, *args, **kwargs):
        return self.experts(*args, **kwargs)


def mixtral_config(inner=INNER):
    return MixtralConfig(
        vocab_size=tiny_models.VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )


def qwen2_moe_config():
    return Qwen2MoeConfig(
        vocab_size=tiny_models.VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        moe_intermediate_size=INNER,
        shared_expert_intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )


def gpt_oss_config():
    return GptOssConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)


def nemotron_config():
    return NemotronHConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        n_routed_experts=EXPERTS,
        mlp_hidden_act="relu2",
    )


CLASSES = {
    "mixtral": (MixtralExperts, mixtral_config),
    "qwen2_moe": (Qwen2MoeExperts, qwen2_moe_config),
    "gpt_oss": (GptOssExperts, gpt_oss_config),  # transposed, biases, a gate of its own
    "nemotron_h": (NemotronHExperts, nemotron_config),  # no gate
}
WEIGHTS = ("experts.gate_up_proj", "experts.down_proj")


def adapted(model, weights=WEIGHTS, **options):
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options}
    return get_peft_model(
        model, LoraConfig(target_modules=[], target_parameters=list(weights), **options)
    )


def pair(kind="mixtral", implementation="grouped_mm", dtype=torch.float32, **options):
    """(stock, fused) of a block of experts."""
    torch.manual_seed(0)
    experts, config = CLASSES[kind]
    made = config()
    made._experts_implementation = implementation
    block = Block(experts(made))
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    if kind == "nemotron_h":
        options.setdefault("weights", ("experts.up_proj", "experts.down_proj"))
    stock = adapted(block.to(dtype), **options)
    fused = copy.deepcopy(stock)
    fusetune.fuse(fused)
    return stock, fused


def inputs(tokens=9, dtype=torch.float32, experts=EXPERTS):
    index = torch.rand(tokens, experts).topk(2).indices
    return torch.randn(tokens, HIDDEN).to(dtype), index, torch.rand(tokens, 2).to(dtype)


def results(model, x, index, weights):
    x, weights = (t.clone().requires_grad_() for t in (x, weights))
    y = model(x, index, weights)
    y.square().sum().backward()
    named = model.named_parameters()
    grads = {name: p.grad.clone() for name, p in named if p.grad is not None}
    model.zero_grad()
    return {"y": y.detach(), "dx": x.grad, "dweights": weights.grad, **grads}


def exact(model):
    """In float64, for which torch has no grouped product."""
    model = float64_copy(model)
    for module in model.modules():
        if hasattr(module, "is_concatenated"):
            module.config._experts_implementation = "eager"
    return model


def double(stock, x, index, weights):
    return results(exact(stock), x.double(), index, weights.double())


def layer(model):
    return model.base_model.model.experts


# --- the numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", CLASSES)
def test_values_and_gradients_are_pefts(kind, implementation, dtype, calls):
    stock, fused = pair(kind, implementation, dtype)
    assert fusetune.fuse(fused).stock == []
    given = inputs(dtype=dtype)
    assert_near(results(fused, *given), results(stock, *given), double(stock, *given))
    assert calls.count(OP) == 2
    assert calls.count("swiglu") == (kind in ("mixtral", "qwen2_moe"))


@pytest.mark.parametrize("tokens", [0, 1, 40])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_numbers_of_tokens(implementation, tokens, calls):
    stock, fused = pair(implementation=implementation)
    given = inputs(tokens)
    if tokens:
        assert_near(results(fused, *given), results(stock, *given), double(stock, *given))
    else:
        assert fused(*given).shape == (0, HIDDEN)
    assert calls.count(OP) == 2


@pytest.mark.parametrize("weights", [WEIGHTS[:1], WEIGHTS[1:], WEIGHTS[::-1]], ids=str)
def test_one_weight_adapted_and_either_order(weights, calls):
    stock, fused = pair(weights=weights)
    given = inputs()
    assert_near(results(fused, *given), results(stock, *given), double(stock, *given))
    assert calls.count(OP) == len(weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CLASSES)
def test_by_torchs_grouped_products(kind, dtype, monkeypatch, calls):
    """What runs on a GPU and under torch.compile."""
    monkeypatch.setattr(peft_experts, "_composed", lambda x: True)
    stock, fused = pair(kind, dtype=dtype, r=3)
    given = inputs(dtype=dtype)
    assert_near(results(fused, *given), results(stock, *given), double(stock, *given))
    assert OP not in calls
    assert fusetune.fuse(fused).rows[0].backend == "torch"


def test_sizes_that_torchs_grouped_product_refuses(monkeypatch, calls):
    monkeypatch.setattr(peft_experts, "_composed", lambda x: True)
    monkeypatch.setitem(CLASSES, "odd", (MixtralExperts, lambda: mixtral_config(inner=20)))
    stock, fused = pair("odd", "eager")
    given = inputs()
    assert torch.equal(fused(*given), stock(*given))
    assert "multiples of 8" in fusetune.fuse(fused).stock[0].reason
    assert calls == []


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_models(kind, implementation, calls):
    torch.manual_seed(0)
    made = {"mixtral": mixtral_config, "qwen2_moe": qwen2_moe_config}[kind]()
    model = (MixtralForCausalLM if kind == "mixtral" else Qwen2MoeForCausalLM)(made)
    model.set_experts_implementation(implementation)
    stock = adapted(model, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    fused = copy.deepcopy(stock)
    report = fusetune.fuse(fused)
    assert [r.method for r in report.fused].count("LoRA experts") == 1
    given = tiny_models.token_inputs()
    assert_near(step(fused, given), step(stock, given), step(exact(stock), given))
    assert calls.count(OP) == 2


def test_experts_without_tokens_have_zero_gradients():
    stock, fused = pair()
    x, index, weights = inputs()
    index = torch.tensor([[0, 2]] * len(x))
    got, eager = results(fused, x, index, weights), results(stock, x, index, weights)
    assert_near(got, eager, double(stock, x, index, weights))
    [gradient] = [g for n, g in got.items() if "base_layer" not in n and "lora_A" in n]
    by_expert = gradient.view(EXPERTS, -1)
    assert by_expert[[0, 2]].any(1).all()
    assert not by_expert[[1, 3]].any()


# --- D6 -------------------------------------------------------------------------------------------


class Folds(TorchDispatchMode):
    """Counts products that make something of a whole stack's size."""

    def __init__(self, size):
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.baddbmm.default, torch.ops.aten.bmm.default):
            self.count += out.numel() >= self.size
        return out


def test_d6_peft_folds_every_stack_twice_and_we_never_do(monkeypatch):
    monkeypatch.setattr(peft_experts, "_composed", lambda x: True)  # what the dispatcher can see
    stock, fused = pair(implementation="eager")
    counts = []
    for model in (stock, fused):
        with Folds(EXPERTS * HIDDEN * INNER) as folds, torch.no_grad():
            model(*inputs(1))
        counts.append(folds.count)
    assert counts == [4, 0]


def test_no_tensor_of_a_stacks_size_is_made(monkeypatch, calls):
    """Of one token's experts, only their own weights are read."""
    _, fused = pair(implementation="eager")
    size = EXPERTS * HIDDEN * INNER
    empty = torch.empty

    def small(*args, **kwargs):
        out = empty(*args, **kwargs)
        assert out.numel() < size
        return out

    monkeypatch.setattr(torch, "empty", small)
    results(fused, *inputs(1))
    assert calls.count(OP) == 2


# --- guards ---------------------------------------------------------------------------------------


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
