"""The ops' torch.library, and the choice of who carries each of them out.

Every op has a list of `Impl`s. For a `Case` (device and dtypes) the one of highest priority that
supports it runs; the choice is made once per case and remembered. FUSETUNE_BACKEND, or
`use_backend`, forces one: where it cannot run it then raises with the reason, while "auto" falls
back and keeps the reasons for `explain`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

LIB = torch.library.Library("fusetune", "DEF")
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Any:
    """The op of `schema`, of torch.library: what torch.compile, export and fake tensors see.

    fake: gives results of the right shapes and dtypes. backward, setup_context: for autograd.
    """
    name = schema.partition("(")[0]
    LIB.define(schema)
    LIB.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusetune::{name}", fake, lib=LIB)
    if backward is not None:
        torch.library.register_autograd(
            f"fusetune::{name}", backward, setup_context=setup_context, lib=LIB
        )
    return getattr(torch.ops.fusetune, name).default


class Case(NamedTuple):
    """What the choice of an implementation may depend on."""

    device: str  # "cpu", "cuda", ...
    dtype: torch.dtype  # of the activations, or of the weight to quantise
    weight: torch.dtype | None = None  # of a dense weight; None for a 4-bit one


@dataclass(frozen=True)
class Impl:
    """One way to carry out an op. `supports` gives None, or the reason why not."""

    name: str
    run: Callable[..., Any]
    supports: Callable[[Case], str | None]
    priority: int


class Op:
    """An op and its implementations."""

    def __init__(self, name: str, *impls: Impl) -> None:
        self.name = name
        self.impls = sorted(impls, key=lambda impl: -impl.priority)
        self._chosen: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._names: dict[tuple[Any, ...], str] = {}
        OPS[name] = self

    def run(
        self, device: str, dtype: torch.dtype, weight: torch.dtype | None
    ) -> Callable[..., Any]:
        """The implementation's function for this case. Hot: one dictionary look-up."""
        key = (device, dtype, weight)
        return self._chosen.get(key) or self._choose(key)

    def _choose(self, key: tuple[Any, ...]) -> Callable[..., Any]:
        run = _outside_autocast(self.select(Case(*key)).run, key[0])
        self._chosen[key] = run
        return run

    def carrier(self, device: str, dtype: torch.dtype, weight: torch.dtype | None) -> str:
        """The name of the implementation for this case. As hot as `run`."""
        key = (device, dtype, weight)
        if key not in self._names:
            self._names[key] = self.select(Case(*key)).name
        return self._names[key]

    def select(self, case: Case) -> Impl:
        """The implementation that runs in this case.

        Raises ValueError where a forced backend cannot run.
        """
        reasons = []
        for impl in self.impls:
            if _state.backend not in ("auto", impl.name):
                continue
            reason = impl.supports(case)
            if reason is None:
                return impl
            reasons.append(f"{impl.name}: {reason}")
        why = "; ".join(reasons) or "this op has no such implementation"
        raise ValueError(f"{self.name} cannot run on backend {_state.backend!r}: {why}")

    def explain(self, case: Case) -> list[tuple[str, str | None]]:
        """(name, None or the reason why not) of every implementation, best first."""
        return [(impl.name, impl.supports(case)) for impl in self.impls]

    def forget(self) -> None:
        """Drops remembered choices, after the backend has changed."""
        self._chosen.clear()
        self._names.clear()


def _outside_autocast(run: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`run` with autocast off: an implementation's own matmuls are to use the dtypes they name."""
    if not torch.amp.is_autocast_available(device):
        return run

    def call(*args: Any) -> Any:
        if not torch.is_autocast_enabled(device):
            return run(*args)
        with torch.autocast(device, enabled=False):
            return run(*args)

    return call


OPS: dict[str, Op] = {}


@dataclass
class _State:
    backend: str
    decode_int16: bool


def _checked_backend(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin} must be one of {BACKENDS}, got {name!r}")
    return name


_state = _State(
    backend=_checked_backend(os.environ.get("FUSETUNE_BACKEND") or "auto", "FUSETUNE_BACKEND"),
    decode_int16=os.environ.get("FUSETUNE_DECODE_INT16", "") not in ("", "0"),
)


def backend() -> str:
    """The backend in force: "auto", or the one that is forced."""
    return _state.backend


def set_backend(name: str) -> None:
    """Forces a backend for all ops, or "auto". Raises ValueError for an unknown name."""
    _state.backend = _checked_backend(name, "backend")
    for op in OPS.values():
        op.forget()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend` for the length of a with block."""
    before = _state.backend
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def decode_int16() -> bool:
    """Whether inference with few rows may round activations to int16; see `set_decode_int16`."""
    return _state.decode_int16


def set_decode_int16(enabled: bool) -> None:
    """Allows the faster decode path of 4-bit layers on the CPU. Off unless asked for.

    With up to 8 rows and no gradient asked for, activations are rounded to int16 in blocks of 64:
    at most 2e-4 relative error of the output. FUSETUNE_DECODE_INT16=1 does the same.
    """
    _state.decode_int16 = enabled


def plain(tensor: torch.Tensor) -> bool:
    """Whether a kernel may be given the tensor's memory at once.

    Otherwise (fake tensors, subclasses, layouts other than strided, or a mode that wants to see
    every op) the call goes through the dispatcher.
    """
    kind = type(tensor)
    return (
        (kind is torch.Tensor or kind is torch.nn.Parameter)
        and tensor.layout is torch.strided
        and not torch._C._len_torch_dispatch_stack()
    )
