"""Which layers of a model hold an AdaLoRA adapter, and its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn


class Triplets(NamedTuple):
    """One layer's adapter: row i of A [r, K], E [r, 1] and column i of B [N, r] are a triplet."""

    name: str  # of the layer
    layer: Any  # peft.tuners.adalora.AdaLoraLayer
    lora_A: torch.Tensor
    lora_E: torch.Tensor
    lora_B: torch.Tensor


def triplets(model: nn.Module, adapter: str) -> list[Triplets]:
    """The layers below `model` that have the adapter, in the order of `named_modules`.

    By a walk that stops at them, and takes a tenth of the time of `named_parameters`: it runs in
    every step.
    """
    found = []
    for name, layer in _layers(model):
        inside = layer._modules
        parameters = [
            inside[key]._parameters.get(adapter) for key in ("lora_A", "lora_E", "lora_B")
        ]
        if parameters[0] is not None:
            found.append(Triplets(name, layer, *parameters))
    return found


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    seen = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        name, module = stack.pop()
        below = module._modules
        if not below or id(module) in seen:
            continue
        seen.add(id(module))
        if "lora_E" in below:
            yield name, module
            continue
        prefix = f"{name}." if name else ""
        stack += [
            (prefix + key, child) for key, child in reversed(below.items()) if child is not None
        ]


def special(parameter: torch.Tensor) -> str | None:
    """Why a parameter is not one whose memory can be read and written at once; None if it is."""
    if type(parameter) is not nn.Parameter:
        return f"a {type(parameter).__name__}, not a plain parameter"
    return "partitioned by DeepSpeed" if hasattr(parameter, "ds_id") else None
