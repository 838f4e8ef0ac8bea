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
from peft.tuners.lora import dora
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
    module_reason,
    no_kernel,
)
from fusetune.ops.multi_lora_linear import stacks


class Adapter(NamedTuple):
    """What a fused forward needs of an adapter."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    lora_bias: torch.Tensor | None
    scaling: float | torch.Tensor
    dropout_p: float  # 0 in evaluation
    magnitude: torch.Tensor | None  # DoRA's

    @property
    def op(self) -> str:
        return "lora_linear" if self.magnitude is None else "dora_linear"

    @property
    def groupable(self) -> bool:
        """Whether `ops.lora_linear_group` has it."""
        return self.magnitude is None


class Several(NamedTuple):
    """What it needs of several: active ones, which are summed, or one for each row of the batch."""

    adapters: list[Adapter]
    adapter_of: list[int] | None  # the adapter of each row, -1 none; None: all are summed

    @property
    def lora_A(self) -> torch.Tensor:
        """That of an adapter: all have its dtype."""
        return self.adapters[0].lora_A

    @property
    def magnitude(self) -> None:
        """None: there is no DoRA among them."""
        return None

    @property
    def groupable(self) -> bool:
        """Whether `ops.lora_linear_group` has them."""
        return False

    @property
    def op(self) -> str:
        dropped = any(adapter.dropout_p for adapter in self.adapters)
        stacked = stacks(self.lora_A.device, self.adapter_of is not None, dropped)
        return "lora_linear" if stacked else "multi_lora_linear"


class Call(NamedTuple):
    """A call that is to be fused: what a layer's op takes besides x."""

    dtype: torch.dtype  # that x is cast to
    weight: Any
    bias: torch.Tensor | None
    adapter: Adapter | Several


def active_adapter(
    layer: Any, adapter_names: Sequence[str] | None = None
) -> Adapter | Several | str:
    """The `Adapter`s of a `lora.LoraLayer` that are to act, or why PEFT has to carry them out.

    The active ones, or those of the rows of a batch where adapter_names gives each its own. One
    for all rows: an `Adapter`; more, or rows without one: `Several`; else a reason.
    """
    if layer._disable_adapters:
        return "adapters are disabled"
    if layer.merged_adapters:
        return "the adapter is merged"
    # _modules[...]: nn.Module's own attribute lookup takes half a microsecond each.
    in_layer = layer._modules["lora_A"]._modules
    given = layer.active_adapters if adapter_names is None else dict.fromkeys(adapter_names)
    names = [name for name in given if name in in_layer]
    if len(names) == 1 and adapter_names is None:
        return _adapter(layer, names[0])
    if not names:
        return "no active adapter" if adapter_names is None else "no row has an adapter"
    adapters: list[Adapter] = []
    for name in names:
        adapter = _adapter(layer, name)
        if isinstance(adapter, str):
            return f"{len(names)} adapters, and of {name}: {adapter}"
        if adapter.magnitude is not None:
            return f"{len(names)} adapters, and {name} is a DoRA"
        adapters.append(adapter)
    if len({adapter.lora_A.dtype for adapter in adapters}) > 1:
        return f"{len(names)} adapters of different dtypes"
    if adapter_names is None:
        return Several(adapters, None)
    if len(names) == 1 == len(given):
        return adapters[0]
    places = {name: place for place, name in enumerate(names)}
    return Several(adapters, [places.get(name, -1) for name in adapter_names])


def _adapter(layer: Any, name: str) -> Adapter | str:
    """One adapter of a layer, or why PEFT has to carry it out."""
    modules = layer._modules
    magnitude = dora_magnitude(layer, name) if name in layer.lora_variant else None
    if isinstance(magnitude, str):
        return magnitude
    lora_A = modules["lora_A"]._modules[name]
    lora_B = modules["lora_B"]._modules[name]
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
    if holder.fan_in_fan_out != (type(layer._modules["base_layer"]) is Conv1D):
        return "DoRA's fan_in_fan_out is not the base layer's"
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
