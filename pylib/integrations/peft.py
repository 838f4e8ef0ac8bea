"""Fused forward of PEFT's LoRA layers, by class swap.

`FusedLinear` adds no state to `peft.tuners.lora.Linear` and overrides only `forward`: adapters,
state dicts, merging and everything else stay PEFT's. Whatever it cannot do exactly runs PEFT's
forward, and `fused_reason` says why.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.lora import dora
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fusetune import ops
from fusetune.integrations import _groups
from fusetune.integrations._guards import (
    KERNEL_DTYPES,
    call_reason,
    carrier,
    linear_reason,
    module_reason,
    no_kernel,
)


class Adapter(NamedTuple):
    """What a fused forward needs of the one active adapter."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    lora_bias: torch.Tensor | None
    scaling: float | torch.Tensor
    dropout_p: float  # 0 in evaluation
    magnitude: torch.Tensor | None  # DoRA's

    @property
    def op(self) -> str:
        return "lora_linear" if self.magnitude is None else "dora_linear"


class Call(NamedTuple):
    """A call that is to be fused: what a layer's op takes besides x."""

    dtype: torch.dtype  # that x is cast to
    weight: Any
    bias: torch.Tensor | None
    adapter: Adapter


def active_adapter(layer: Any) -> Adapter | str:
    """The one active adapter of a `lora.LoraLayer`, or why PEFT has to carry it out."""
    if layer._disable_adapters:
        return "adapters are disabled"
    if layer.merged_adapters:
        return "the adapter is merged"
    # _modules[...]: nn.Module's own attribute lookup takes half a microsecond each.
    modules = layer._modules
    in_layer = modules["lora_A"]._modules
    names = [name for name in layer.active_adapters if name in in_layer]
    if len(names) != 1:
        return f"{len(names)} active adapters" if names else "no active adapter"
    name = names[0]
    magnitude = dora_magnitude(layer, name) if name in layer.lora_variant else None
    if isinstance(magnitude, str):
        return magnitude
    lora_A, lora_B = in_layer[name], modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    dropout_kind = nn.Dropout if type(dropout) is nn.Dropout else nn.Identity
    reason = (
        linear_reason(lora_A, "lora_A")
        or linear_reason(lora_B, "lora_B")
        or module_reason(dropout, "lora_dropout", dropout_kind)
    )
    if reason is not None:
        return reason
    weight_A, weight_B = lora_A._parameters["weight"], lora_B._parameters["weight"]
    if weight_A.dtype != weight_B.dtype or weight_A.dtype not in KERNEL_DTYPES:
        return f"lora_A is {weight_A.dtype}, lora_B {weight_B.dtype}"
    if lora_A._parameters.get("bias") is not None:
        return "lora_A has a bias"
    lora_bias = lora_B._parameters.get("bias")
    if magnitude is not None and lora_bias is not None:
        return "lora_B has a bias beside DoRA"
    # PEFT's DoRA drops nothing while the layer is in evaluation, whatever its dropout is in.
    active = dropout_kind is nn.Dropout and dropout.training
    active = active and (magnitude is None or layer.training)
    p = dropout.p if active else 0.0
    return Adapter(weight_A, weight_B, lora_bias, layer.scaling[name], p, magnitude)


def dora_magnitude(layer: Any, name: str) -> torch.Tensor | str:
    """The magnitudes of a layer whose adapter `name` is a DoRA, or why PEFT has to carry it out."""
    variant = type(layer.lora_variant[name])
    if variant is not DoraLinearVariant:
        return f"{variant.__name__} is not fused"
    holder = layer._modules["lora_magnitude_vector"]._modules[name]
    reason = module_reason(holder, "lora_magnitude_vector", dora.DoraLinearLayer)
    if reason is not None:
        return reason
    if holder.fan_in_fan_out:
        return "DoRA over a transposed weight"
    if dora.ENABLE_DORA_CACHING and not holder.training:
        return "PEFT's cache of DoRA's norms is switched on"
    magnitude = holder._parameters.get("weight")
    if type(magnitude) is not nn.Parameter or hasattr(magnitude, "ds_id"):
        return f"DoRA's magnitude is not a plain parameter but {type(magnitude).__name__}"
    return magnitude


def present_method(layer: Any, method: str) -> str:
    """`method`, or what it is with DoRA where the one active adapter is one; for reports."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    kinds = {type(layer.lora_variant.get(name)) for name in active}
    return method.replace("LoRA", "DoRA") if kinds == {DoraLinearVariant} else method


class FusedLinear(lora.Linear):
    """`lora.Linear` over a dense `nn.Linear`, in one fused op."""

    stock_class = lora.Linear
    method = "LoRA"

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., K] -> [..., N], as `lora.Linear.forward`."""
        if args or kwargs:  # adapter_names, alora_offsets
            return super().forward(x, *args, **kwargs)
        call = self.fused_call(x)
        return super().forward(x) if call is None else fused_linear(self, x, call)

    def fused_call(self, x: torch.Tensor) -> Call | None:
        """What is fused of a call with x; None: PEFT's forward has to run."""
        adapter = self._fused_adapter()
        if isinstance(adapter, str) or call_reason(x) is not None:
            return None
        base: Any = self._modules["base_layer"]
        weight = base._parameters["weight"]
        bias = base._parameters.get("bias")
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        # What F.linear would compute in, and so give back.
        dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
        castable = autocast and x.dtype in KERNEL_DTYPES
        if (x.dtype != dtype and not castable) or not (
            self.cast_input_dtype_enabled or x.dtype == adapter.lora_A.dtype
        ):
            return None
        if no_kernel(adapter.op, device, dtype, weight.dtype):
            return None
        return Call(dtype, weight, bias, adapter)

    def _fused_adapter(self) -> Adapter | str:
        base: Any = self._modules["base_layer"]
        reason = linear_reason(base, "base_layer")
        if reason is not None:
            return reason
        if base._parameters["weight"].requires_grad:
            return "the base weight is trained"
        return active_adapter(self)

    def fused_reason(self) -> str | None:
        """Why the layer, in its present state, runs PEFT's forward; None where it is fused."""
        adapter = self._fused_adapter()
        if isinstance(adapter, str):
            return adapter
        return self.fused_carrier()[1]

    def fused_carrier(self) -> tuple[str, str | None]:
        """(backend, reason against it) for an input of the weight's dtype and device."""
        weight = self.weight
        op = "lora_linear" if self.present_method == self.method else "dora_linear"
        return carrier(op, weight.device.type, weight.dtype, weight.dtype)

    @property
    def present_method(self) -> str:
        """LoRA or DoRA, for the report."""
        return present_method(self, self.method)


def fused_linear(layer: Any, x: torch.Tensor, call: Call) -> torch.Tensor:
    """The layer's result by `ops.lora_linear` or `ops.dora_linear`, or of a group it belongs to."""
    adapter = call.adapter
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


def unsupported(module: nn.Module) -> tuple[str, str] | None:
    """(method, reason) of a PEFT layer that has no fused class; None for any other module."""
    if not isinstance(module, BaseTunerLayer):
        return None
    kind = type(module)
    package = kind.__module__.removeprefix("peft.tuners.").split(".")[0]
    method = "LoRA" if isinstance(module, lora.LoraLayer) else package
    return method, f"{package}.{kind.__name__} has no fused path"
