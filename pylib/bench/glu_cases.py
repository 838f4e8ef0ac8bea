"""Cases of glu, against PyTorch's operators: SwiGLU and GEGLU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn import functional

from fusetune import ops

from .cases import EXACT, NAMES
from .timing import Case, Result, Run

Tensor = torch.Tensor

EAGER: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
}


def glu(m: int, n: int, dtype: torch.dtype, activation: str = "silu") -> Case:
    """y and both gradients of m rows of n."""
    gate, up, dy = (torch.randn(m, n).to(dtype) for _ in range(3))

    def eager(gate: Tensor, up: Tensor) -> Tensor:
        return EAGER[activation](gate) * up

    def all_of(function: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> Run:
        def run() -> Result:
            leaves = [tensor.to(dtype).detach().requires_grad_() for tensor in (gate, up)]
            y = function(*leaves)
            return y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))

        return run

    silu = activation == "silu"
    return Case(
        op="swiglu" if silu else "geglu",
        name=f"forward + backward {NAMES[dtype]}{'' if silu else ', ' + activation}",
        shape=f"{m} × {n}",
        ours=all_of(partial(ops.glu, activation=activation), dtype),
        peers={"torch": all_of(eager, dtype)},
        exact=all_of(eager, torch.float64),
        tolerance=2 * EXACT[dtype],  # the function rounds too
    )


def swiglu_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16) if full else (torch.float32,):
        yield glu(1024, n, dtype)


def geglu_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    for activation in ("gelu", "gelu_new"):
        for dtype in (torch.float32, torch.bfloat16) if full else (torch.float32,):
            yield glu(1024, n, dtype, activation)


def small_cases(m: int, n: int, dtype: torch.dtype) -> Iterator[Case]:
    """Every activation, for `verify`."""
    for activation in EAGER:
        yield glu(m, n, dtype, activation)
