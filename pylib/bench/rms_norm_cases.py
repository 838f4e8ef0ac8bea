"""Cases of rms_norm: against the expression of transformers' models, and PyTorch's own operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from fusetune import ops

from .cases import EXACT, NAMES
from .timing import Case, Result, Run

Tensor = torch.Tensor
EPS = 1e-5


def expression(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As LLaMA's norm has it, and most others of transformers."""
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def _torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, eps)


def rms_norm(m: int, n: int, dtype: torch.dtype) -> Case:
    """y and dx of m rows of n, with a frozen weight."""
    x, dy = (torch.randn(m, n).to(dtype) for _ in range(2))
    weight = torch.randn(n).to(dtype)

    def both(function: Callable[[Tensor, Tensor, float], Tensor], dtype: torch.dtype) -> Run:
        def run() -> Result:
            leaf = x.to(dtype).detach().requires_grad_()
            y = function(leaf, weight.to(dtype), EPS)
            return y.detach(), *torch.autograd.grad(y, leaf, dy.to(dtype))

        return run

    return Case(
        op="rms_norm",
        name=f"forward + backward {NAMES[dtype]}",
        shape=f"{m} × {n}",
        ours=both(ops.rms_norm, dtype),
        peers={"transformers": both(expression, dtype), "torch": both(_torch, dtype)},
        exact=both(expression, torch.float64),
        tolerance=2 * EXACT[dtype],  # the sum of squares rounds too
    )


def rms_norm_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    for width in (576, n) if full else (n,):
        for dtype in (torch.float32, torch.bfloat16) if full else (torch.float32,):
            yield rms_norm(1024, width, dtype)
