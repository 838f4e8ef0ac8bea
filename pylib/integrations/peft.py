"""Fused forward of PEFT's LoRA layers, by class swap.

`FusedLinear` adds no state to `peft.tuners.lora.Linear` and overrides only `forward`: adapters,
state dicts, merging and everything else stay PEFT's. Whatever it cannot do exactly runs PEFT's
forward, and `fused_reason` says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from fusetune import ops
from fusetune.integrations import _groups
from fusetune.integrations._guards import (
    KERNEL_DTYPES,
    call_reason,
    carrier,
    linear_reason,
    no_kernel,
)
from fusetune.integrations._lora_adapters import Adapter, Several, active_adapter


class Call(NamedTuple):
    """A call that is to be fused: what a layer's op takes besides x."""

    dtype: torch.dtype  # that x is cast to
    weight: Any
    bias: torch.Tensor | None
    adapter: Adapter | Several


def present_method(layer: Any, method: str) -> str:
    """`method`, or what it is with DoRA where the one active adapter is one; for reports."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    kinds = {type(layer.lora_variant.get(name)) for name in active}
    return method.replace("LoRA", "DoRA") if kinds == {DoraLinearVariant} else method


def present_op(layer: Any) -> str:
    """The op of a fused layer in its present state, or the one of its method; for reports."""
    adapter = layer._fused_adapter()
    if not isinstance(adapter, str):
        return str(adapter.op)
    return "lora_linear" if layer.present_method == layer.method else "dora_linear"


def miscounts(x: torch.Tensor, adapter_names: Sequence[str] | None) -> bool:
    """Whether PEFT is going to refuse adapter_names: x has another number of rows."""
    return adapter_names is not None and (x.dim() < 2 or len(adapter_names) != len(x))


class FusedLinear(lora.Linear):
    """`lora.Linear` over a dense `nn.Linear` or a `Conv1D`, under one adapter or several."""

    stock_class = lora.Linear
    method = "LoRA"

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., K] -> [..., N], as `lora.Linear.forward`."""
        names = kwargs.get("adapter_names")
        if args or len(kwargs) > (names is not None):  # alora_offsets
            return super().forward(x, *args, **kwargs)
        call = self.fused_call(x, names)
        return super().forward(x, **kwargs) if call is None else fused_linear(self, x, call)

    def fused_call(self, x: torch.Tensor, names: Sequence[str] | None = None) -> Call | None:
        """What is fused of a call with x, under adapter_names; None: PEFT's forward has to run."""
        adapter = self._fused_adapter(names)
        if isinstance(adapter, str) or call_reason(x) is not None or miscounts(x, names):
            return None
        base: Any = self._modules["base_layer"]
        weight = base._parameters["weight"]
        if type(base) is Conv1D:  # stored [K, N]
            weight = weight.t()
        bias = base._parameters.get("bias")
        dtype = dense_dtype(self, x, weight, adapter.lora_A.dtype)
        if dtype is None or no_kernel(adapter.op, x.device.type, dtype, weight.dtype):
            return None
        return Call(dtype, weight, bias, adapter)

    def _fused_adapter(self, names: Sequence[str] | None = None) -> Adapter | Several | str:
        base: Any = self._modules["base_layer"]
        kind = Conv1D if type(base) is Conv1D else nn.Linear
        reason = linear_reason(base, "base_layer", kind)
        if reason is not None:
            return reason
        if base._parameters["weight"].requires_grad:
            return "the base weight is trained"
        return active_adapter(self, names)

    def fused_reason(self) -> str | None:
        """Why the layer, in its present state, runs PEFT's forward; None where it is fused."""
        adapter = self._fused_adapter()
        if isinstance(adapter, str):
            return adapter
        return self.fused_carrier()[1]

    def fused_carrier(self) -> tuple[str, str | None]:
        """(backend, reason against it) for an input of the weight's dtype and device."""
        weight = self.weight
        return carrier(present_op(self), weight.device.type, weight.dtype, weight.dtype)

    @property
    def present_method(self) -> str:
        """LoRA or DoRA, for the report."""
        return present_method(self, self.method)


def dense_dtype(
    layer: Any, x: torch.Tensor, weight: torch.Tensor, adapter: torch.dtype
) -> torch.dtype | None:
    """The dtype in which F.linear would compute x weight^T, and which it would give back.

    None where it, or PEFT's layer with an adapter of the given dtype, would refuse x.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    castable = autocast and x.dtype in KERNEL_DTYPES
    if x.dtype != dtype and not castable:
        return None
    return dtype if layer.cast_input_dtype_enabled or x.dtype == adapter else None


def fused_linear(layer: Any, x: torch.Tensor, call: Call) -> torch.Tensor:
    """The layer's result by the op of its adapters, or of a group that it belongs to."""
    adapter = call.adapter
    if isinstance(adapter, Several):
        lora_A, lora_B, lora_bias, scaling, dropout_p, _ = zip(*adapter.adapters, strict=True)
        return ops.multi_lora_linear(
            x.to(call.dtype),
            call.weight,
            lora_A,
            lora_B,
            scaling,
            adapter_of=adapter.adapter_of,
            bias=call.bias,
            lora_bias=lora_bias,
            dropout_p=dropout_p,
        )
    if adapter.magnitude is not None:
        return ops.dora_linear(
            x.to(call.dtype),
            call.weight,
            adapter.lora_A,
            adapter.lora_B,
            adapter.scaling,
            adapter.magnitude,
            bias=call.bias,
            dropout_p=adapter.dropout_p,
        )
    y = _groups.shared(layer, x, call)
    if y is not None:
        return y
    return ops.lora_linear(
        x.to(call.dtype),
        call.weight,
        adapter.lora_A,
        adapter.lora_B,
        adapter.scaling,
        bias=call.bias,
        lora_bias=adapter.lora_bias,
        dropout_p=adapter.dropout_p,
    )


SWAPS: dict[type[nn.Module], type[nn.Module]] = {lora.Linear: FusedLinear}

_LEFT_TO_PEFT = {
    "lora.MultiheadAttention": (
        "PEFT adds out_proj's adapter twice to the weight and once to the gradient"
    ),
}


def unsupported(module: nn.Module) -> tuple[str, str] | None:
    """(method, reason) of a PEFT layer that has no fused class; None for any other module."""
    if not isinstance(module, BaseTunerLayer):
        return None
    kind = type(module)
    package = kind.__module__.removeprefix("peft.tuners.").split(".")[0]
    method = "LoRA" if isinstance(module, lora.LoraLayer) else package
    method = "AdaLoRA" if package == "adalora" else method
    name = f"{package}.{kind.__name__}"
    return method, _LEFT_TO_PEFT.get(name, f"{name} has no fused path")
