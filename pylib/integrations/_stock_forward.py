"""Whether a class of transformers has a forward that is known, instruction for instruction."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

_FLAGS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE


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
