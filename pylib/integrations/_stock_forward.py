"""Fused classes for those of transformers whose forward is known, instruction for instruction.

Dozens of its models have the same norm or the same MLP under a name of their own. A fused class is
made for each that is met: of a base of ours, which says what it knows, and the stock class.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

_FLAGS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE


class KnownForward:
    """What the bases share."""

    stock_class: type[nn.Module]
    swaps: dict[type[nn.Module], type[Any]]  # stock class -> fused class, of those that were met
    _known_forward: Any  # the forward that the base knows; without a docstring, as it is compared

    @classmethod
    def knows(cls, kind: type[nn.Module]) -> bool:
        """Whether a stock class is one that the base can stand in for."""
        return has_forward(kind, cls._known_forward)

    @classmethod
    def members(cls, stock: type[nn.Module]) -> dict[str, Any]:
        """What the fused class of a stock class has of its own, beside the base's."""
        return {}

    def __reduce__(self: Any) -> tuple[Any, ...]:
        """By the stock class: this one is made at run time."""
        return _blank, (type(self).__bases__[0], self.stock_class), self.__dict__


def discover(model: nn.Module, *bases: type[KnownForward]) -> None:
    """Makes a fused class of each class in a model that one of the bases knows."""
    for kind in {type(module) for module in model.modules()}:
        if not kind.__module__.startswith("transformers.models."):
            continue
        for base in bases:
            if base.knows(kind):
                _fused_class(base, kind)


def _fused_class(base: type[KnownForward], stock: type[nn.Module]) -> type[Any]:
    """Always the same one."""
    if stock not in base.swaps:
        name, own = f"Fused{stock.__name__}", {"stock_class": stock, **base.members(stock)}
        base.swaps[stock] = type(name, (base, stock), own)
    return base.swaps[stock]


def _blank(base: type[KnownForward], stock: type[nn.Module]) -> nn.Module:
    """For unpickling and copying, which fill it."""
    kind: Any = _fused_class(base, stock)
    module: nn.Module = kind.__new__(kind)
    return module


def has_forward(kind: type[nn.Module], known: Any) -> bool:
    """Whether a class defines a forward that does what the function `known` does."""
    code = getattr(kind.__dict__.get("forward"), "__code__", None)
    return code is not None and _instructions(code) == _instructions(known.__code__)


def _instructions(code: Any) -> tuple[Any, ...]:
    """All that makes a function do what it does, but what the names of modules stand for."""
    return (
        code.co_code,
        code.co_names,
        code.co_varnames,
        code.co_consts,
        code.co_argcount,
        code.co_kwonlyargcount,
        code.co_flags & _FLAGS,
    )
