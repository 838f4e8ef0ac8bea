"""Tiny experts with LoRA on their stacks of weights, stock and fused, and a step of them."""

import copy

import torch
from model_equality import float64_copy
from peft import LoraConfig, get_peft_model
from tiny_models import VOCABULARY
from torch import nn
from transformers import GptOssConfig, MixtralConfig, NemotronHConfig, Qwen2MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

import fusetune

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
        vocab_size=VOCABULARY,
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
        vocab_size=VOCABULARY,
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
