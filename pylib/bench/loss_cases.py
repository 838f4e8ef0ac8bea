"""Cases of linear_cross_entropy: against the last layer and the loss as two operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from fusetune import ops

from .cases import EXACT, NAMES
from .timing import Case, Result, Run

Tensor = torch.Tensor
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _in_torch(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(x, weight), target)


def _with_logits(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return ops.cross_entropy(ops.linear(x, weight), target)


def linear_cross_entropy(m: int, k: int, v: int, dtype: torch.dtype, ignored: float = 0) -> Case:
    """Loss and dx of m rows of k features and v classes; a share of the rows is ignored."""
    x, weight = torch.randn(m, k).to(dtype), (torch.randn(v, k) / k**0.5).to(dtype)
    target = torch.randint(v, (m,))
    target[: int(ignored * m)] = -100

    def both(loss: Loss, dtype: torch.dtype) -> Run:
        def run() -> Result:
            leaf = x.to(dtype).detach().requires_grad_()
            value = loss(leaf, weight.to(dtype), target)
            return value.detach(), *torch.autograd.grad(value, leaf)

        return run

    share = f", {ignored:.0%} ignored" if ignored else ""
    return Case(
        op="linear_cross_entropy",
        name=f"forward + backward {NAMES[dtype]}{share}",
        shape=f"{m} × {k} → {v}",
        ours=both(ops.linear_cross_entropy, dtype),
        peers={"torch": both(_in_torch, dtype), "ours with logits": both(_with_logits, dtype)},
        exact=both(_in_torch, torch.float64),
        tolerance=8 * EXACT[dtype],  # logits, their gradient and its products round
    )


def linear_cross_entropy_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    for ignored in (0, 0.5) if full else (0,):
        yield linear_cross_entropy(512, 576, 12 * n, torch.float32, ignored)
