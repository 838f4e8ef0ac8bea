"""Fused forward of PEFT's LoRA on the stacked weights of a mixture's experts, by class swap.

PEFT wraps the experts once for each weight (`target_parameters`), and every forward adds the
adapters to whole stacks of weights, twice, whatever was routed where. Here the outermost wrapper
sorts the tokens by expert and passes each through the narrow factors of the experts it goes to; the
weights are only read. The experts' mathematics is the one that transformers' experts functions
share, with the same attributes of the module.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers.activations import ACT2FN

from fusetune import ops
from fusetune.integrations._experts import (
    Adapters,
    Factors,
    active_factors,
    as_stored,
    experts_reason,
    grouped_reason,
    moe,
)
from fusetune.integrations._guards import call_reason, carrier, module_reason, no_kernel

Tensor = torch.Tensor
_OP = "lora_grouped_linear"
_SILU = type(ACT2FN["silu"])


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
        if _composed(x):
            fits = grouped_reason(experts) is None
        else:
            fits = not no_kernel(_OP, "cpu", dtype or x.dtype, self.get_param().dtype)
        if dtype is None or not fits:
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

    def fused_reason(self) -> str | None:
        """Why the layer, in its present state, runs PEFT's forward; None where it is fused."""
        adapters = self._fused_adapters()
        return adapters if isinstance(adapters, str) else self.fused_carrier()[1]

    def fused_carrier(self) -> tuple[str, str | None]:
        """(backend, reason against it) for hidden states of the weights' dtype and device."""
        weight = self.get_param()
        if _composed(weight):
            return "torch", grouped_reason(self.get_base_layer())
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
    activated = _activated(experts, projected)
    projected = _project(experts, "down_proj", activated, ids, offsets, adapters)
    if experts.has_post_expert_norm:
        projected = experts.post_expert_norm(projected)
    weighted = projected * weights.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(tokens * k, device=order.device)
    return weighted[back].view(tokens, k, weighted.shape[1]).sum(1)


def _project(
    experts: Any, name: str, x: Tensor, ids: Tensor, offsets: Tensor, adapters: Adapters
) -> Tensor:
    weight, factors = as_stored(experts, name), adapters.get(name)
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
    default = type(experts)._apply_gate is getattr(moe, "_default_apply_gate", None)
    if plain and default and not no_kernel("glu", device, dtype):
        gate, up = projected.chunk(2, -1)
        return ops.glu(gate, up)
    y = experts._apply_gate(projected)
    return y


SWAPS: dict[type[nn.Module], type[nn.Module]] = {ParamWrapper: FusedParamWrapper}
