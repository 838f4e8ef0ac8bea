"""Fused matmul of a model's own frozen linear layers, by class swap: on CPUs, where ours is ahead.

`ops.linear` decides for each call, and on Intel leaves most of them to torch's MKL.

A layer below a PEFT layer stays stock: the fused PEFT layer reads its weight and does not call it.
Adapters of ours call the layer that they are around, and it is fused as any other. Layers that are
trained, or are none of fp32 on a CPU with our kernels, are none of ours, and the report does not
mention them.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear as stock_linear

from fusetune import ops
from fusetune.integrations._classes import set_class
from fusetune.integrations._guards import call_reason, carrier, no_kernel

_INSIDE: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # of layers that may read their weights
_BIASES = (nn.Parameter, torch.Tensor)  # a plain tensor is what BitFit lends for a call


class FusedLinear(nn.Linear):
    """`nn.Linear` with a frozen weight, by `ops.linear`."""

    stock_class = nn.Linear
    method = "frozen linear"

    @classmethod
    def accepts(cls, module: Any) -> bool:
        """Whether a layer is one that we carry out faster."""
        return module not in _INSIDE and frozen_reason(module) is None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N], as `nn.Linear.forward`."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        if (
            weight is None
            or frozen_reason(self) is not None
            or call_reason(x) is not None
            or x.dtype != torch.float32
            or x.device.type != "cpu"
            or x.shape[-1:].numel() != weight.shape[1]
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
        ):
            return stock_linear(x, self.weight, self.bias)
        return ops.linear(x, weight, bias)

    def fused_reason(self) -> str | None:
        """Why the layer, in its present state, runs torch's matmul; None where it is fused."""
        return frozen_reason(self)

    def fused_carrier(self) -> tuple[str, str | None]:
        """(backend, reason against it)."""
        return carrier("linear", self.weight.device.type, self.weight.dtype, self.weight.dtype)


def frozen_reason(module: nn.Module) -> str | None:
    """Why a linear layer is not one of fp32 with a frozen weight that our kernels multiply."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if type(weight) is not nn.Parameter or hasattr(weight, "ds_id"):
        return f"the weight is not a plain parameter but {type(weight).__name__}"
    if weight.requires_grad:
        return "the weight is trained"
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or not weight.is_contiguous():
        return f"the weight is {weight.dtype} on {weight.device}"
    if bias is not None and (type(bias) not in _BIASES or bias.dtype != torch.float32):
        return "the bias is no plain parameter of fp32"
    if no_kernel("linear", "cpu", torch.float32, torch.float32):
        return "no kernel on this CPU"
    return None


SWAPS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FusedLinear}


def discover(model: nn.Module) -> None:
    """Takes note of the layers inside PEFT's, and gives back those that were wrapped since."""
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        _INSIDE.discard(module)  # it may be inside no longer: adapters were unloaded
    for module in model.modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        for child in _owned(module):
            if isinstance(child, nn.Linear):
                _INSIDE.add(child)
            if isinstance(child, FusedLinear):
                set_class(child, nn.Linear)


def _owned(layer: nn.Module) -> Iterator[nn.Module]:
    """What is inside a tuner's layer, without the base layer where that is only called."""
    called = getattr(layer, "calls_base_layer", False)
    for name, child in layer.named_children():
        if not (called and name == "base_layer"):
            yield from child.modules()
