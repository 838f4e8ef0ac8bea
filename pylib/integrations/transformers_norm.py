"""Fused RMS norms of transformers' models, by class swap: on CPUs, in fp32.

Dozens of transformers' models have the same norm under a name of their own. They are known by their
forward, which has to be `_stock_forward` below, instruction for instruction. Elsewhere than on a
CPU in fp32 they are none of ours, and the report does not mention them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fusetune import ops
from fusetune.integrations._guards import call_reason, carrier, no_kernel
from fusetune.integrations._stock_forward import has_forward


class FusedRMSNorm:
    """What all fused norms share; the first base of each."""

    stock_class: type[nn.Module]
    method = "rms norm"

    @classmethod
    def accepts(cls, module: Any) -> bool:
        """Whether a norm is one that we carry out."""
        return _reason(module) is None

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [..., N] -> [..., N], as the stock class."""
        weight = self._parameters["weight"]
        if (
            _reason(self) is not None
            or call_reason(hidden_states) is not None
            or hidden_states.dtype != torch.float32
            or hidden_states.device.type != "cpu"
            or hidden_states.shape[-1:] != weight.shape
            or torch.compiler.is_compiling()
        ):
            y: torch.Tensor = self.stock_class.forward(self, hidden_states)
            return y
        return ops.rms_norm(hidden_states, weight, self.variance_epsilon)

    def fused_reason(self: Any) -> str | None:
        """Why the norm, in its present state, runs the stock expression; None: it is fused."""
        return _reason(self)

    def fused_carrier(self: Any) -> tuple[str, str | None]:
        """(backend, reason against it)."""
        return carrier("rms_norm", self.weight.device.type, self.weight.dtype)

    def __reduce__(self: Any) -> tuple[Any, ...]:
        """By the stock class: this one is made at run time."""
        return _blank, (self.stock_class,), self.__dict__


def _reason(module: Any) -> str | None:
    weight, eps = module._parameters.get("weight"), module.__dict__.get("variance_epsilon")
    if type(weight) is not nn.Parameter or hasattr(weight, "ds_id"):
        return f"the weight is not a plain parameter but {type(weight).__name__}"
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or weight.dim() != 1:
        return f"the weight is {weight.dtype} on {weight.device}"
    if not isinstance(eps, float):
        return f"variance_epsilon is a {type(eps).__name__}"
    return "no kernel on this CPU" if no_kernel("rms_norm", "cpu", torch.float32) else None


def _stock_forward(self: Any, hidden_states: Any) -> Any:
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)


SWAPS: dict[type[nn.Module], type[Any]] = {}
_MET: set[type[nn.Module]] = set()


def discover(model: nn.Module) -> None:
    """Enters the norm classes of a model in SWAPS."""
    for kind in {type(module) for module in model.modules()} - _MET:
        _MET.add(kind)
        if kind.__module__.startswith("transformers.models.") and has_forward(kind, _stock_forward):
            fused_class(kind)


def fused_class(stock: type[nn.Module]) -> type[Any]:
    """The fused class of a norm's class; always the same one."""
    if stock not in SWAPS:
        bases = (FusedRMSNorm, stock)
        SWAPS[stock] = type(f"Fused{stock.__name__}", bases, {"stock_class": stock})
    return SWAPS[stock]


def _blank(stock: type[nn.Module]) -> nn.Module:
    """For unpickling and copying, which fill it."""
    kind: Any = fused_class(stock)
    module: nn.Module = kind.__new__(kind)
    return module
