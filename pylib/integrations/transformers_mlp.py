"""Fused activation of transformers' gated MLPs, by class swap.

Dozens of transformers' models have the same MLP under a name of their own. They are known by their
forward, which has to be `_stock_forward` below, instruction for instruction; a fused class is made
for each class that is met. Projections are called as they are, whatever they have become (LoRA,
4-bit, hooked); only the product of the activation and `up` is another's.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from fusetune import ops
from fusetune.integrations._guards import (
    KERNEL_DTYPES,
    call_reason,
    carrier,
    module_reason,
    no_kernel,
)

_SILU = (nn.SiLU, type(ACT2FN["silu"]))  # some transformers have a class of their own


class FusedGatedMLP:
    """What all fused MLPs share; the first base of each."""

    stock_class: type[nn.Module]
    method = "swiglu"

    @classmethod
    def accepts(cls, module: Any) -> bool:
        """Whether a module of the stock class is one of SwiGLU: others are none of ours."""
        return type(module._modules.get("act_fn")) in _SILU

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """x [..., H] -> [..., H], as the stock class."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self._activation_reason() is not None or not _fusable(gate, up):
            y: torch.Tensor = self.down_proj(self.act_fn(gate) * up)
            return y
        y = self.down_proj(ops.swiglu(gate, up))
        return y

    def _activation_reason(self: Any) -> str | None:
        activation = self._modules.get("act_fn")
        kind = type(activation)
        return module_reason(activation, "act_fn", kind if kind in _SILU else nn.SiLU)

    def fused_reason(self: Any) -> str | None:
        """Why the module, in its present state, runs the stock expression; None: it is fused."""
        reason: str | None = self._activation_reason()
        return reason or self.fused_carrier()[1]

    def fused_carrier(self: Any) -> tuple[str, str | None]:
        """(backend, reason against it) for activations of the parameters' device and dtype."""
        return carrier("swiglu", *_case(self))

    def __reduce__(self: Any) -> tuple[Any, ...]:
        """By the stock class: this one is made at run time."""
        return _blank, (self.stock_class,), self.__dict__


def _case(module: nn.Module) -> tuple[str, torch.dtype]:
    """Device and dtype of a module's activations, as its parameters tell them."""
    parameters = list(module.parameters())
    device = parameters[0].device.type if parameters else "cpu"
    floats = (p.dtype for p in parameters if p.is_floating_point())
    return device, next(floats, torch.float32)


def _fusable(gate: Any, up: Any) -> bool:
    return (
        call_reason(gate) is None
        and call_reason(up) is None
        and gate.dtype in KERNEL_DTYPES
        and (gate.dtype, gate.shape, gate.device) == (up.dtype, up.shape, up.device)
        and not no_kernel("swiglu", gate.device.type, gate.dtype)
    )


def _stock_forward(self: Any, x: Any) -> Any:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


_KINDS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE
SWAPS: dict[type[nn.Module], type[Any]] = {}
_MET: set[type[nn.Module]] = set()


def discover(model: nn.Module) -> None:
    """Enters the MLP classes of a model in SWAPS."""
    for kind in {type(module) for module in model.modules()} - _MET:
        _MET.add(kind)
        if kind.__module__.startswith("transformers.models.") and _has_the_stock_forward(kind):
            fused_class(kind)


def _has_the_stock_forward(kind: type[nn.Module]) -> bool:
    code = getattr(kind.__dict__.get("forward"), "__code__", None)
    return code is not None and _instructions(code) == _instructions(_stock_forward.__code__)


def _instructions(code: Any) -> tuple[Any, ...]:
    """All that makes a function do what it does, if it reads no globals."""
    return (
        code.co_code,
        code.co_names,
        code.co_varnames,
        code.co_consts,
        code.co_argcount,
        code.co_kwonlyargcount,
        code.co_flags & _KINDS,
    )


def fused_class(stock: type[nn.Module]) -> type[Any]:
    """The fused class of an MLP's class; always the same one."""
    if stock not in SWAPS:
        name = f"Fused{stock.__name__}"
        SWAPS[stock] = type(name, (FusedGatedMLP, stock), {"stock_class": stock})
    return SWAPS[stock]


def _blank(stock: type[nn.Module]) -> nn.Module:
    """For unpickling and copying, which fill it."""
    kind: Any = fused_class(stock)
    module: nn.Module = kind.__new__(kind)
    return module
