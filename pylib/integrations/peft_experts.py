"""Fused forward of PEFT's LoRA on the stacked weights of a mixture's experts, by class swap.

PEFT wraps the experts once for each weight (`target_parameters`), and every forward adds the
adapters to whole stacks of weights, twice, whatever was routed where. Here the outermost wrapper
sorts the tokens by expert and passes each through the narrow factors of the experts it goes to; the
weights are only read. The experts' mathematics is the one that transformers' experts functions
share, with the same attributes of the module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import moe

from fusetune import ops
from fusetune.integrations._guards import (
    KERNEL_DTYPES,
    call_reason,
    carrier,
    module_reason,
    no_kernel,
)

Tensor = torch.Tensor
_OP = "lora_grouped_linear"
_SILU = type(ACT2FN["silu"])
# By name of config._experts_implementation: what must be registered there. "eager" is the class's.
_KNOWN: dict[str, Callable[..., Any] | None] = {
    "eager": None,
    "batched_mm": moe.batched_mm_experts_forward,
    "grouped_mm": moe.grouped_mm_experts_forward,
}


class Factors(NamedTuple):
    """One active adapter of a stack of weights."""

    lora_A: Tensor  # [E, r, K]
    lora_B: Tensor  # [E, N, r]
    scaling: float


Adapters = dict[str, Factors | None]  # by the weight's name; None: no active adapter


class FusedParamWrapper(ParamWrapper):
    """`lora.ParamWrapper` over transformers' experts: tokens through factors, weights unfolded."""

    stock_class = ParamWrapper
    method = "LoRA experts"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the experts: hidden states [T, H] and each token's experts and weights [T, k]."""
        routing = _routing(x, args, kwargs)
        adapters = self._fused_adapters()
        if routing is None or isinstance(adapters, str) or call_reason(x) is not None:
            return super().forward(x, *args, **kwargs)
        experts = self.get_base_layer()
        dtype = _compute_dtype(experts, x)
        if dtype is None or (not _composed(x) and no_kernel(_OP, "cpu", dtype, self._dtype())):
            return super().forward(x, *args, **kwargs)
        return experts_forward(experts, x.to(dtype), *routing, adapters).to(x.dtype)

    def _fused_adapters(self) -> Adapters | str:
        adapters: Adapters = {}
        layer: Any = self
        while isinstance(layer, ParamWrapper):
            if layer is not self:
                reason = module_reason(layer, "base_layer", FusedParamWrapper)
                if reason is not None:
                    return reason
            factors = active_factors(layer)
            if isinstance(factors, str):
                return factors
            adapters[layer.parameter_name] = factors
            layer = layer.base_layer
        if not any(adapters.values()):
            return "no active adapter"
        return experts_reason(layer, adapters) or adapters

    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.get_param().dtype
        return dtype

    def fused_reason(self) -> str | None:
        """Why the layer, in its present state, runs PEFT's forward; None where it is fused."""
        adapters = self._fused_adapters()
        return adapters if isinstance(adapters, str) else self.fused_carrier()[1]

    def fused_carrier(self) -> tuple[str, str | None]:
        """(backend, reason against it) for hidden states of the weights' dtype and device."""
        weight = self.get_param()
        if _composed(weight):
            return "torch", None
        return carrier(_OP, weight.device.type, weight.dtype, weight.dtype)


# PEFT goes by the class's name, not by its kind, when it looks for wrappers to add an adapter to.
FusedParamWrapper.__name__ = ParamWrapper.__name__


def _routing(x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """(top_k_index, top_k_weights) of a call of the experts; None for another kind of call."""
    if len(args) > 2 or not kwargs.keys() <= {"top_k_index", "top_k_weights"}:
        return None
    given = dict(zip(("top_k_index", "top_k_weights"), args, strict=False)) | kwargs
    if len(given) != 2 or len(args) + len(kwargs) != 2:
        return None
    index, weights = given["top_k_index"], given["top_k_weights"]
    for tensor in (x, index, weights):
        if type(tensor) is not Tensor or tensor.dim() != 2:
            return None
    return (index, weights) if index.shape == weights.shape and len(x) == len(index) else None


def _compute_dtype(experts: Any, x: Tensor) -> torch.dtype | None:
    """What transformers' function would multiply in; None where it would refuse x."""
    weight: torch.dtype = experts.down_proj.dtype
    if experts.config._experts_implementation == "grouped_mm":
        return weight  # it converts, and no autocast reaches it
    if torch.is_autocast_enabled(x.device.type):
        autocast: torch.dtype = torch.get_autocast_dtype(x.device.type)
        return autocast
    return weight if x.dtype == weight else None


def _composed(x: Tensor) -> bool:
    """Whether the factors are applied by torch's grouped products, and not by our op."""
    return x.device.type != "cpu" or torch.compiler.is_compiling()


# --- guards ---------------------------------------------------------------------------------------


def active_factors(layer: Any) -> Factors | str | None:
    """The one active adapter of a `lora.ParamWrapper`, or why PEFT has to carry it out."""
    if layer._disable_adapters:
        return "adapters are disabled"
    if layer.merged_adapters:
        return "the adapter is merged"
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) > 1:
        return f"{len(names)} active adapters"
    if not names:
        return None
    scaling = layer.scaling[names[0]]
    if isinstance(scaling, Tensor):
        return "the scaling is a tensor"
    weights = [
        layers[names[0]]._parameters.get("weight") for layers in (layer.lora_A, layer.lora_B)
    ]
    for role, weight in zip(("lora_A", "lora_B"), weights, strict=True):
        if type(weight) is not nn.Parameter or hasattr(weight, "ds_id"):
            return f"the weight of {role} is not a plain parameter but {type(weight).__name__}"
    lora_A, lora_B = weights
    if lora_A.dtype != lora_B.dtype or lora_A.dtype not in KERNEL_DTYPES:
        return f"lora_A is {lora_A.dtype}, lora_B {lora_B.dtype}"
    experts = layer.num_experts
    by_expert = lora_A.view(experts, -1, lora_A.shape[1])
    packed = lora_B.view(lora_B.shape[0], -1, experts)  # an expert in every last place
    return Factors(by_expert, packed.permute(2, 0, 1), scaling)


def experts_reason(experts: Any, adapters: Adapters) -> str | None:
    """Why the experts have to be called; None where their attributes say what they compute."""
    kind = type(experts)
    name = f"the base layer is a {kind.__name__}"
    if not kind.__module__.startswith("transformers.models.") or not _decorated(kind):
        return f"{name}, not one of transformers' experts"
    reason = module_reason(experts, "the experts", kind)
    if reason is not None:
        return reason
    implementation = experts.config._experts_implementation
    expected = _KNOWN.get(implementation, moe)
    if expected is moe or moe.ALL_EXPERTS_FUNCTIONS.get(implementation) is not expected:
        return f"the experts' implementation {implementation!r} is not known"
    if experts._is_expert_parallel:
        return "the experts are spread over processes"
    names = {"gate_up_proj" if experts.has_gate else "up_proj", "down_proj"}
    if not adapters.keys() <= names:
        return f"adapters of {', '.join(sorted(adapters.keys() - names))} are not fused"
    for name in names:
        reason = _stack_reason(name, experts._parameters.get(name), experts)
        if reason is not None:
            return reason
    for name, factors in adapters.items():
        weight = _as_stored(experts, name)
        fits = factors is None or (
            (weight.shape[0], factors.lora_B.shape[1], factors.lora_A.shape[2]) == weight.shape
        )
        if not fits:
            return f"the adapter of {name} has not its weight's shape"
    return None


def _decorated(kind: Any) -> bool:
    """Whether the class's forward is the dispatcher of transformers' decorator for experts."""
    forward = kind.__dict__.get("forward")
    code = getattr(forward, "__code__", None)
    if code is None or "experts_interface" not in code.co_freevars:
        return False
    interface = forward.__closure__[code.co_freevars.index("experts_interface")].cell_contents
    return interface is moe.ALL_EXPERTS_FUNCTIONS


def _stack_reason(name: str, weight: Any, experts: Any) -> str | None:
    if type(weight) is not nn.Parameter:
        return f"{name} is not a plain parameter but {type(weight).__name__}"
    if hasattr(weight, "ds_id"):
        return f"{name} is partitioned by DeepSpeed"
    if weight.dim() != 3 or weight.shape[0] != experts.num_experts:
        return f"{name} is no stack of {experts.num_experts} matrices"
    if weight.dtype not in KERNEL_DTYPES:
        return f"{name} is {weight.dtype}"
    return f"{name} is trained" if weight.requires_grad else None


# --- the experts' forward -------------------------------------------------------------------------


def experts_forward(
    experts: Any, hidden: Tensor, index: Tensor, weights: Tensor, adapters: Adapters
) -> Tensor:
    """hidden [T, H], index and weights [T, k] -> [T, H], in the products' dtype or wider."""
    tokens, k = index.shape
    ids, order = index.reshape(-1).sort(stable=True)
    numbers = torch.arange(experts.num_experts, device=ids.device)
    offsets = torch.searchsorted(ids, numbers, right=True).to(torch.int32)
    rows = hidden[order // k]
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    projected = _project(experts, up, rows, ids, offsets, adapters)
    projected = _project(
        experts, "down_proj", _activated(experts, projected), ids, offsets, adapters
    )
    if experts.has_post_expert_norm:
        projected = experts.post_expert_norm(projected)
    weighted = projected * weights.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(tokens * k, device=order.device)
    return weighted[back].view(tokens, k, weighted.shape[1]).sum(1)


def _as_stored(experts: Any, name: str) -> Tensor:
    """The stack [E, N, K]: a view where it is stored transposed."""
    weight: Tensor = experts._parameters[name]
    return weight.transpose(1, 2) if experts.is_transposed else weight


def _project(
    experts: Any, name: str, x: Tensor, ids: Tensor, offsets: Tensor, adapters: Adapters
) -> Tensor:
    weight, factors = _as_stored(experts, name), adapters.get(name)
    if factors is None or _composed(x):
        y: Tensor = moe._grouped_linear(x, weight.to(x.dtype), offsets)
        if factors is not None:
            y = y + _low_rank(x, factors, offsets)
    else:
        y = ops.lora_grouped_linear(x, weight, *factors, offsets.tolist())
    if experts.has_bias:
        y = y + experts._parameters[f"{name}_bias"][ids].to(y.dtype)
    return y


def _low_rank(x: Tensor, factors: Factors, offsets: Tensor) -> Tensor:
    """scaling x A^T B^T by groups, with ranks filled up to the 16 bytes that the product asks."""
    fill = -factors.lora_A.shape[1] % 8
    lora_A = nn.functional.pad(factors.lora_A, (0, 0, 0, fill)).to(x.dtype)
    lora_B = nn.functional.pad(factors.lora_B, (0, fill)).contiguous().to(x.dtype)
    s = moe._grouped_linear(x, lora_A, offsets) * factors.scaling
    y: Tensor = moe._grouped_linear(s, lora_B, offsets)
    return y


def _activated(experts: Any, projected: Tensor) -> Tensor:
    if not experts.has_gate:
        y: Tensor = experts.act_fn(projected)
        return y
    device, dtype = projected.device.type, projected.dtype
    activation = experts._modules.get("act_fn")
    plain = type(activation) is _SILU and module_reason(activation, "act_fn", _SILU) is None
    default = type(experts)._apply_gate is moe._default_apply_gate
    if plain and default and not no_kernel("swiglu", device, dtype):
        return ops.swiglu(*projected.chunk(2, -1))
    y = experts._apply_gate(projected)
    return y


SWAPS: dict[type[nn.Module], type[nn.Module]] = {ParamWrapper: FusedParamWrapper}
