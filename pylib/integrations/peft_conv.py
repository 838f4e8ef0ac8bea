"""Fused forward of PEFT's LoRA on convolutions, by class swap.

The base convolution and the adapter's first one are called as they are; the second one, whose
kernel is 1, its scaling and the sum are one op, in place on the base's output.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d
from torch import nn

from fusetune import ops
from fusetune.integrations._guards import (
    KERNEL_DTYPES,
    call_reason,
    carrier,
    module_reason,
    no_kernel,
)


class Adapter(NamedTuple):
    """What a fused convolution needs of the one active adapter."""

    lora_A: nn.Module
    dropout: nn.Module
    lora_B: torch.Tensor  # [N, r, 1, ...]
    bias: torch.Tensor | None
    scaling: float


class _FusedConv:
    """What the fused convolutions share; the first base of each."""

    stock_class: type[nn.Module]
    method = "LoRA"

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [M, C, ...] -> [M, N, ...], as the stock class."""
        stock = super().forward  # type: ignore[misc]
        adapter = None if args or kwargs else self._fused_adapter()
        if adapter is None or isinstance(adapter, str) or call_reason(x) is not None:
            y: torch.Tensor = stock(x, *args, **kwargs)
            return y
        weight = self.base_layer.weight
        if x.dim() != weight.dim() or no_kernel("lora_up", x.device.type, weight.dtype):
            y = stock(x)
            return y
        y = self.base_layer(x)
        cast = self._cast_input_dtype(x, adapter.lora_A.weight.dtype)
        s = adapter.lora_A(adapter.dropout(cast))
        return ops.lora_up(y, s, adapter.lora_B.flatten(1), adapter.scaling, bias=adapter.bias)

    def _fused_adapter(self: Any) -> Adapter | str:
        base = self._modules["base_layer"]
        return base_reason(base) or active_adapter(self, base)

    def fused_reason(self: Any) -> str | None:
        """Why the layer, in its present state, runs PEFT's forward; None where it is fused."""
        adapter = self._fused_adapter()
        if isinstance(adapter, str):
            return adapter
        reason: str | None = self.fused_carrier()[1]
        return reason

    def fused_carrier(self: Any) -> tuple[str, str | None]:
        """(backend, reason against it) for an output of the weight's dtype and device."""
        weight = self.weight
        return carrier("lora_up", weight.device.type, weight.dtype)


def base_reason(base: Any) -> str | None:
    """Why the output of the base layer cannot be written over; None where it can."""
    if type(base) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return f"base_layer is a {type(base).__name__}, not a plain convolution"
    if base.groups != 1:
        return "the base layer has groups"
    return module_reason(base, "base_layer", type(base))


def active_adapter(layer: Any, base: Any) -> Adapter | str:
    """The one active adapter of a `lora.ConvNd`, or why PEFT has to carry it out."""
    if layer._disable_adapters:
        return "adapters are disabled"
    if layer.merged_adapters:
        return "the adapter is merged"
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1:
        return f"{len(names)} active adapters" if names else "no active adapter"
    name = names[0]
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__} is not fused"
    scaling = layer.scaling[name]
    if isinstance(scaling, torch.Tensor):
        return "the scaling is a tensor"
    lora_A, lora_B = layer.lora_A[name], layer.lora_B[name]
    if any(getattr(lora_A, key, None) != getattr(base, key) for key in _GEOMETRY):
        return "PEFT's lora_A has not the geometry of the base layer"  # its dilation, for one
    return _up_reason(lora_B, type(base)) or Adapter(
        lora_A, layer.lora_dropout[name], lora_B.weight, lora_B.bias, scaling
    )


_GEOMETRY = ("kernel_size", "stride", "padding", "dilation")


def _up_reason(lora_B: Any, kind: type[nn.Module]) -> str | None:
    """Why lora_B is not the product that PEFT makes it; None where it is."""
    reason = module_reason(lora_B, "lora_B", kind)
    if reason is not None:
        return reason
    weight = lora_B._parameters.get("weight")
    if type(weight) is not nn.Parameter or hasattr(weight, "ds_id"):
        return f"the weight of lora_B is not a plain parameter but {type(weight).__name__}"
    if weight.dtype not in KERNEL_DTYPES:
        return f"lora_B is {weight.dtype}"
    pointwise = {*lora_B.kernel_size, *lora_B.stride, lora_B.groups} == {1}
    return None if pointwise and not any(lora_B.padding) else "lora_B is no convolution of kernel 1"


class FusedConv1d(_FusedConv, Conv1d):
    stock_class = Conv1d


class FusedConv2d(_FusedConv, Conv2d):
    stock_class = Conv2d


class FusedConv3d(_FusedConv, Conv3d):
    stock_class = Conv3d


SWAPS: dict[type[nn.Module], type[Any]] = {
    kind.stock_class: kind for kind in (FusedConv1d, FusedConv2d, FusedConv3d)
}
