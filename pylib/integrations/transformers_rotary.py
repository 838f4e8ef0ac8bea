"""Fused rotary position embedding of transformers' attention modules, by class swap.

A module is one of ours where its forward turns queries and keys by a function of its file called
`apply_rotary_pos_emb`, and that function gives what LLaMA's gives. Its fused class has the same
forward, instruction for instruction, which finds `ops.rotary` under that name. Any other, and any
where there is no kernel, is none of ours, and the report does not mention it. Calls that ops.rotary
cannot carry out exactly (tables of another dtype, autocast's among them), and compiled ones, run
the stock function.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fusetune import ops
from fusetune.integrations import _stock_forward
from fusetune.integrations._guards import KERNEL_DTYPES, call_reason, carrier, case_of, no_kernel
from fusetune.integrations._stock_forward import KnownForward
from fusetune.reference import rotary as reference

Tensor = torch.Tensor
Turn = Callable[..., tuple[Tensor, Tensor]]
SWAPS: dict[type[nn.Module], type[Any]] = {}
_NAME = "apply_rotary_pos_emb"
_OLD_NAME = "past_key_values"  # of an argument, which a decorator of the stock forward translates


class FusedRotary(KnownForward):
    """What all fused attention modules share; the first base of each."""

    swaps = SWAPS
    method = "rotary"

    @classmethod
    def knows(cls, kind: type[nn.Module]) -> bool:
        """Whether a class turns queries and keys as the kernel does."""
        forward = kind.__dict__.get("forward")
        known = inspect.unwrap(forward) if forward is not None else None
        if not isinstance(known, types.FunctionType) or _NAME not in known.__code__.co_names:
            return False
        stock = known.__globals__.get(_NAME)
        return callable(stock) and _gives_the_same(stock)

    @classmethod
    def members(cls, stock: type[nn.Module]) -> dict[str, Any]:
        """The forward of a fused class."""
        return {"forward": _with_ours(stock.forward)}

    @classmethod
    def accepts(cls, module: Any) -> bool:
        """Whether a module of a known class is where we have kernels."""
        return _reason(module) is None

    def fused_reason(self: Any) -> str | None:
        """Why the module, in its present state, runs the stock function; None: it is fused."""
        return _reason(self)

    def fused_carrier(self: Any) -> tuple[str, str | None]:
        """(backend, reason against it)."""
        return carrier("rotary", *case_of(self))


def _with_ours(forward: Any) -> Any:
    """A forward that finds our function where it looks for the stock one."""
    known = inspect.unwrap(forward)
    names = {**known.__globals__, _NAME: _ours_or(known.__globals__[_NAME])}
    turned = types.FunctionType(
        known.__code__, names, known.__name__, known.__defaults__, known.__closure__
    )
    functools.update_wrapper(turned, known)
    del turned.__wrapped__  # type: ignore[attr-defined]
    turned.__kwdefaults__ = known.__kwdefaults__

    @functools.wraps(turned)
    def either(self: Any, *args: Any, **kwargs: Any) -> Any:
        # torch.compile is to see the stock forward, whose names are a module's.
        stock = torch.compiler.is_compiling() or _OLD_NAME in kwargs
        return (forward if stock else turned)(self, *args, **kwargs)

    return either


def _ours_or(stock: Turn) -> Turn:
    """`stock`, by ops.rotary where that can do it."""

    def turn(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        if more or options or not _fusable(q, k, cos, sin):
            return stock(q, k, cos, sin, *more, **options)
        return ops.rotary(q, k, cos, sin)

    return turn


def _fusable(q: Any, k: Any, cos: Any, sin: Any) -> bool:
    return (
        call_reason(q) is None
        and call_reason(k) is None
        and not torch.compiler.is_compiling()
        and q.device == k.device
        and q.dim() == k.dim() == 4
        and q.dtype == k.dtype
        and q.dtype in KERNEL_DTYPES
        and _are_tables(cos, sin, q)
        and not no_kernel("rotary", q.device.type, q.dtype)
    )


def _are_tables(cos: Any, sin: Any, q: Tensor) -> bool:
    batch, _, tokens, dim = q.shape
    return (
        type(cos) is type(sin) is Tensor
        and cos.shape == sin.shape
        and cos.dim() == 3
        and cos.shape[0] in (1, batch)
        and cos.shape[1:] == (tokens, dim)
        and dim % 2 == 0
        and cos.dtype == sin.dtype == q.dtype  # of wider tables stock would return the wider dtype
        and cos.device == sin.device == q.device
        and not (cos.requires_grad or sin.requires_grad)
    )


@functools.cache
def _gives_the_same(stock: Turn) -> bool:
    """Whether a function turns queries and keys as LLaMA's does, halves against each other."""
    numbers = torch.arange(1.0, 241.0).sin()  # none twice, and no random number drawn
    q, k = numbers.view(2, 3, 5, 8), numbers[:80].view(2, 1, 5, 8)
    cos, sin = numbers[80:].view(2, 2, 5, 8)
    try:
        with torch.no_grad():
            got = stock(q, k, cos, sin)
    except Exception:  # whatever it is, it takes other arguments
        return False
    expected = (reference.rotary(x, cos, sin, False) for x in (q, k))
    return len(got) == 2 and all(map(torch.equal, got, expected))


def _reason(module: Any) -> str | None:
    device, dtype = case_of(module)
    if dtype not in KERNEL_DTYPES or no_kernel("rotary", device, dtype):
        return f"no kernel for {dtype} on {device}"
    return None


def discover(model: nn.Module) -> None:
    """Enters the attention classes of a model in SWAPS."""
    _stock_forward.discover(model, FusedRotary)
