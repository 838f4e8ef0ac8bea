"""Merging IA3 into 4-bit weights, which PEFT refuses: by quantising the scaled weight anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners import ia3
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from fusetune.ops import dequantize_4bit, quantize_4bit
from fusetune.quantized_weight import QuantizedWeight


def merge_ia3_4bit(model: Any, adapter_names: Sequence[str] | None = None) -> nn.Module:
    """The base model with its IA3 adapters in the weights, 4-bit ones among them; for good.

    model: a `PeftModel` with IA3; adapter_names: which adapters, in their product, the active ones
    where it is None. Like PEFT's `merge_and_unload`, which refuses a model in 4 bits: layers are
    changed in place and the base model is returned.

    A 4-bit weight W is decoded, scaled in fp32 and quantised again, in the same format and block
    size, so that the result differs from the scaled weight l W by a rounding to 4 bits:

        |W' - l W| <= g / 2 a + |a' - a|        of each element

    with g the widest gap of the code's values (0.304 for NF4, 1/3 for FP4), a the largest |l W| of
    the element's block, and a' = a but for double quantisation, which rounds it to 8 bits. Where
    the outputs of a layer are scaled (keys, values), its blocks lie within rows and l is positive,
    every code keeps its value and the first term is 0. The bias of such a layer is scaled too. An
    adapter that is not merged has no such error: keep it if that matters.

    Raises TypeError or ValueError, with nothing changed: for a model without IA3, an unknown
    adapter, a layer in 8 bits or merged already, and a weight that cannot be read.
    """
    tuner = model.base_model if isinstance(model, PeftModel) else model
    if not isinstance(tuner, ia3.IA3Model):
        raise TypeError(f"model must be a PeftModel with IA3, got {type(model).__name__}")
    names = list(tuner.active_adapters if adapter_names is None else adapter_names)
    unknown = [name for name in names if name not in tuner.peft_config]
    if unknown:
        raise ValueError(
            f"adapter_names: {unknown[0]!r} is none of the adapters {sorted(tuner.peft_config)}"
        )
    layers = {n: m for n, m in tuner.named_modules() if isinstance(m, ia3.IA3Layer)}
    for name, layer in layers.items():
        _check(name, layer)
    scaled = [_scaled(layer, names) for layer in layers.values() if _is_4bit(layer)]
    for layer in layers.values():
        if not _is_4bit(layer):
            layer.merge(adapter_names=names)
    for base, weight, bias in scaled:
        base.weight = weight
        if bias is not None:
            base.bias.data = bias
    # IA3Model's own refuses a model in 4 bits, even to take its layers out.
    unload: Any = BaseTuner._unload_and_optionally_merge
    merged: nn.Module = unload(tuner, merge=False)
    return merged


def _is_4bit(layer: Any) -> bool:
    return isinstance(layer.get_base_layer(), bnb.nn.Linear4bit)


def _check(name: str, layer: Any) -> None:
    base = layer.get_base_layer()
    if layer.merged:
        raise ValueError(f"{name}: an adapter is merged already; call unmerge_adapter() first")
    if isinstance(base, bnb.nn.Linear8bitLt):
        raise ValueError(f"{name}: IA3 cannot be merged into a weight of 8 bits")
    if not _is_4bit(layer):
        return
    try:
        QuantizedWeight.from_bnb(base.weight)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


@torch.no_grad()
def _scaled(layer: Any, names: list[str]) -> tuple[Any, nn.Parameter, torch.Tensor | None]:
    """(base layer, its new weight, its new bias where that is scaled too)."""
    base = layer.get_base_layer()
    old = QuantizedWeight.from_bnb(base.weight)
    size = old.shape[1] if layer.is_feedforward else old.shape[0]
    scale = torch.ones(size, device=old.device)
    for name in names:
        if name in layer.ia3_l:
            scale = scale * layer.ia3_l[name].flatten().float()
    dense = dequantize_4bit(old, torch.float32)
    dense *= scale if layer.is_feedforward else scale[:, None]
    new = quantize_4bit(
        dense, quant_type=old.quant_type, blocksize=old.blocksize, double_quant=old.nested
    )
    weight = dataclasses.replace(new, dtype=old.dtype).to_bnb(base.weight.quant_storage)
    weight.module = base
    if layer.is_feedforward or base.bias is None:
        return base, weight, None
    return base, weight, (base.bias.float() * scale).to(base.bias.dtype)
