"""Cases of LoRA on other layers than linear ones, against what PEFT does there, by torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

from fusetune import ops

from .cases import EXACT, NAMES
from .timing import Case, Result, Run

Tensor = torch.Tensor
_SCALING = 2.0


def _case(
    op: str,
    name: str,
    shape: str,
    ours: Callable[..., Tensor],
    peer: Callable[..., Tensor],
    trained: dict[str, Tensor],
    frozen: Tensor,
    dy: Tensor,
    flops: float = 0.0,
) -> Case:
    """The result, and the gradients of `trained`; functions of (frozen, trained by name)."""
    dtype = dy.dtype

    def all_of(function: Callable[..., Tensor], double: bool = False) -> Run:
        def run() -> Result:
            wide = torch.float64 if double else None
            leaves = {
                n: t.to(wide or t.dtype).detach().requires_grad_() for n, t in trained.items()
            }
            y = function(frozen.to(wide or frozen.dtype), **leaves)
            return y.detach(), *torch.autograd.grad(y, [*leaves.values()], dy.to(wide or dtype))

        return run

    return Case(
        op=op,
        name=f"{name}forward + backward {NAMES[dtype]}",
        shape=shape,
        ours=all_of(ours),
        peers={"torch": all_of(peer)},
        exact=all_of(peer, double=True),
        tolerance=2 * EXACT[dtype],
        flops=flops,
    )


def _factors(n: int, k: int, rank: int) -> dict[str, Tensor]:
    """In fp32, as PEFT keeps them."""
    return {"lora_A": torch.randn(rank, k) / k**0.5, "lora_B": torch.randn(n, rank) / rank**0.5}


def transposed_linear(m: int, n: int, k: int, dtype: torch.dtype, rank: int) -> Case:
    """LoRA over a weight that is stored [K, N], as GPT-2's."""
    stored, bias = (torch.randn(k, n) / k**0.5).to(dtype), torch.randn(n)

    def ours(weight: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        b = bias.to(x.dtype)
        return ops.lora_linear(x, weight.t(), lora_A, lora_B, _SCALING, bias=b)

    def peer(weight: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        y = torch.addmm(bias.to(x.dtype), x, weight)
        return (y + x.to(lora_A.dtype) @ lora_A.t() @ lora_B.t() * _SCALING).to(x.dtype)

    trained = {"x": torch.randn(m, k).to(dtype), **_factors(n, k, rank)}
    shape, dy = f"{m} × {n} × {k}", torch.randn(m, n).to(dtype)
    name = f"LoRA r={rank}, transposed weight, "
    return _case("lora_linear", name, shape, ours, peer, trained, stored, dy, 4.0 * m * n * k)


def embedding(m: int, v: int, h: int, dtype: torch.dtype, rank: int) -> Case:
    """m tokens of a vocabulary of v."""
    ids, table = torch.randint(v, (m,)), torch.randn(v, h).to(dtype)

    def ours(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return ops.lora_embedding(ids, weight, lora_A, lora_B, _SCALING)

    def peer(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        low = functional.embedding(ids, lora_A.t())
        y = functional.embedding(ids, weight) + (low @ lora_B.t()) * _SCALING
        return y.to(weight.dtype)

    factors, dy = _factors(h, v, rank), torch.randn(m, h).to(dtype)
    return _case(
        "lora_embedding", f"r={rank}, ", f"{m} of {v} × {h}", ours, peer, factors, table, dy
    )


def convolution(m: int, n: int, side: int, dtype: torch.dtype, rank: int) -> Case:
    """The second half of LoRA on a convolution with n channels and side x side places."""

    def ours(y: Tensor, s: Tensor, lora_B: Tensor) -> Tensor:
        return ops.lora_up(y.clone(), s, lora_B, _SCALING)

    def peer(y: Tensor, s: Tensor, lora_B: Tensor) -> Tensor:
        added = functional.conv2d(s, lora_B[:, :, None, None])
        return (y.clone() + added * _SCALING).to(y.dtype)

    y = torch.randn(m, n, side, side).to(dtype)
    trained = {
        "s": torch.randn(m, rank, side, side),
        "lora_B": torch.randn(n, rank) / rank**0.5,
    }
    shape = f"{m} × {n} × {side} × {side}"
    return _case("lora_up", f"r={rank}, ", shape, ours, peer, trained, y, torch.randn_like(y))


def experts(
    m: int, n: int, k: int, dtype: torch.dtype, rank: int, count: int = 8, transposed: bool = False
) -> Case:
    """m rows spread over `count` experts of n x k."""
    ends = [*torch.randint(0, m + 1, (count - 1,)).sort().values.tolist(), m]
    stack = (torch.randn(count, n, k) / k**0.5).to(dtype)
    if transposed:
        stack = stack.transpose(1, 2).contiguous().transpose(1, 2)

    def ours(weight: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return ops.lora_grouped_linear(x, weight, lora_A, lora_B, _SCALING, ends)

    def peer(weight: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        low = (lora_B.to(weight.dtype), lora_A.to(weight.dtype))
        folded = torch.baddbmm(weight, *low, alpha=_SCALING)
        starts = [0, *ends[:-1]]
        parts = [x[a:b] @ folded[g].t() for g, (a, b) in enumerate(zip(starts, ends, strict=True))]
        return torch.cat(parts)

    trained: dict[str, Any] = {
        "x": torch.randn(m, k).to(dtype),
        "lora_A": torch.randn(count, rank, k) / k**0.5,
        "lora_B": torch.randn(count, n, rank) / rank**0.5,
    }
    shape, dy = f"{m} × {n} × {k}, {count} experts", torch.randn(m, n).to(dtype)
    name = f"r={rank}, "
    return _case("lora_grouped_linear", name, shape, ours, peer, trained, stack, dy)


def small_cases(dtype: torch.dtype) -> Iterator[Case]:
    """For `verify`."""
    for m in (1, 37):
        yield transposed_linear(m, 200, 328, dtype, 5)
    yield embedding(37, 300, 200, dtype, 5)
    yield convolution(2, 33, 7, dtype, 5)
    for transposed in (False, True):
        yield experts(37, 200, 328, dtype, 5, 3, transposed)


def transposed_linear_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    for m in (32, 512) if full else (32,):
        yield transposed_linear(m, n, k, torch.float32, 16)


def lora_embedding_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16) if full else (torch.float32,):
        yield embedding(512, 8 * n, k, dtype, 16)


def lora_up_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16) if full else (torch.float32,):
        yield convolution(8, n // 16, 32, dtype, 16)


def lora_grouped_linear_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    for m in (2, 256) if full else (2,):
        yield experts(m, n // 4, k // 4, torch.float32, 16)
    if full:
        yield experts(256, n // 4, k // 4, torch.bfloat16, 16)
