"""Cases of rotary, against the expression of transformers' models."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from fusetune import ops

from .cases import EXACT, NAMES
from .timing import Case, Result, Run

Tensor = torch.Tensor


def expression(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As LLaMA's apply_rotary_pos_emb has it, and most others of transformers."""

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return query * cos + turned(query) * sin, key * cos + turned(key) * sin


def rotary(
    batch: int, heads: int, kv_heads: int, tokens: int, dim: int, dtype: torch.dtype
) -> Case:
    """Queries and keys turned, and the gradients of both."""
    # as projections give them: heads behind tokens
    given = [torch.randn(batch, tokens, h, dim).to(dtype) for h in (heads, kv_heads)]
    upper = [torch.randn_like(x).transpose(1, 2) for x in given]
    angle = torch.randn(batch, tokens, dim // 2).repeat(1, 1, 2)
    tables = angle.cos().to(dtype), angle.sin().to(dtype)

    def both(function: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> Run:
        def run() -> Result:
            leaves = [x.to(dtype).detach().transpose(1, 2).requires_grad_() for x in given]
            out = function(*leaves, *(table.to(dtype) for table in tables))
            grads = torch.autograd.grad(out, leaves, [dy.to(dtype) for dy in upper])
            return *(t.detach() for t in out), *grads

        return run

    return Case(
        op="rotary",
        name=f"forward + backward {NAMES[dtype]}",
        shape=f"{batch} × {heads}, {kv_heads} × {tokens} × {dim}",
        ours=both(ops.rotary, dtype),
        peers={"transformers": both(expression, dtype)},
        exact=both(expression, torch.float64),
        tolerance=2 * EXACT[dtype],  # two products and their sum
    )


def rotary_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16) if full else (torch.float32,):
        yield rotary(8, 9, 3, 128, 64, dtype)
    if full:
        yield rotary(1, 32, 8, 2048, 128, torch.float32)
