"""Which of PEFT's LoRA and DoRA adapters act in a layer, and whether an op has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import dora
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn
from transformers.pytorch_utils import Conv1D

from fusetune.integrations._guards import KERNEL_DTYPES, linear_reason, module_reason
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
