"""Cases of swiglu, against PyTorch's operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from fusetune import ops

from .cases import EXACT, NAMES
from .timing import Case, Result, Run

Tensor = torch.Tensor


def eager(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def swiglu(m: int, n: int, dtype: torch.dtype) -> Case:
    """y and both gradients of m rows of n."""
    gate, up, dy = (torch.randn(m, n).to(dtype) for _ in range(3))

    def all_of(function: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> Run:
        def run() -> Result:
            leaves = [tensor.to(dtype).detach().requires_grad_() for tensor in (gate, up)]
            y = function(*leaves)
            return y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))

        return run

    return Case(
        op="swiglu",
        name=f"forward + backward {NAMES[dtype]}",
        shape=f"{m} × {n}",
        ours=all_of(ops.swiglu, dtype),
        peers={"torch": all_of(eager, dtype)},
        exact=all_of(eager, torch.float64),
        tolerance=2 * EXACT[dtype],  # the logistic function rounds too
    )


def swiglu_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16) if full else (torch.float32,):
        yield swiglu(1024, n, dtype)
