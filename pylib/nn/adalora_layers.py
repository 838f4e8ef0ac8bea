"""Which layers of a model hold an AdaLoRA adapter, and its parameters."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import nn

KEYS = ("lora_A", "lora_E", "lora_B")


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
    every forward.
    """
    return _having(_looked_into(model)[1], adapter)


class Walk:
    """The `triplets` of a model, kept for as long as `holds` says that a new walk finds the same.

    It goes by all that the walk has read: what each module has below it, down to the layers, and
    the layers' parameters. What lies in a parameter, and in what shape, may change at any time.
    """

    def __init__(self, model: nn.Module, adapter: str) -> None:
        self._model, self._adapter = model, adapter
        self._above, found = _looked_into(model)
        self._below = [dict(module._modules.items()) for module in self._above]
        self._layers = [layer for _, layer in found]
        self._held = self._parameters()
        self.layers = _having(found, adapter)
        self.parameters = {key: [getattr(each, key) for each in self.layers] for key in KEYS}
        self.names = {  # PEFT's, of the parameters
            key: [f"{each.name}.{key}.{adapter}" for each in self.layers] for key in KEYS
        }
        self.mask: Any = None  # what the allocator has made of a rank_pattern for these layers

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy is None, and so is a pickle: it knows of one model only."""
        return type(None), ()

    def holds(self, model: nn.Module, adapter: str) -> bool:
        """Whether the parameters of `Walk(model, adapter)` would be these ones."""
        if model is not self._model or adapter != self._adapter:
            return False
        if [module._modules for module in self._above] != self._below:
            return False
        try:
            return all(map(operator.is_, self._parameters(), self._held))
        except KeyError:  # a layer that is none any more
            return False

    def _parameters(self) -> list[Any]:
        """Those of every layer, None where it does not have the adapter."""
        inside, adapter = [layer._modules for layer in self._layers], self._adapter
        return [each[key]._parameters.get(adapter) for each in inside for key in KEYS]


def _having(layers: list[tuple[str, Any]], adapter: str) -> list[Triplets]:
    found = []
    for name, layer in layers:
        inside = layer._modules
        parameters = [inside[key]._parameters.get(adapter) for key in KEYS]
        if parameters[0] is not None:
            found.append(Triplets(name, layer, *parameters))
    return found


def _looked_into(model: nn.Module) -> tuple[list[nn.Module], list[tuple[str, Any]]]:
    """AdaLoRA's layers below a model with their names, and all modules above and beside them."""
    others: list[nn.Module] = []
    layers = []
    seen = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        name, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        below = module._modules
        if "lora_E" in below:
            layers.append((name, module))
            continue
        others.append(module)
        prefix = f"{name}." if name else ""
        stack += [
            (prefix + key, child) for key, child in reversed(below.items()) if child is not None
        ]
    return others, layers


def special(parameter: torch.Tensor) -> str | None:
    """Why a parameter is not one whose memory can be read and written at once; None if it is."""
    if type(parameter) is not nn.Parameter:
        return f"a {type(parameter).__name__}, not a plain parameter"
    return "partitioned by DeepSpeed" if hasattr(parameter, "ds_id") else None
