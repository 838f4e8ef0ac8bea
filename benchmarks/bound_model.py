"""A model's own parts: what bound.py predicts of their kernels, forward and backward in 16 bits."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import bound_adapters
from benchmarks.bound_launch import Bound, bound
from benchmarks.cards import Card
from benchmarks.ledgers_model import PARTS, Loss, Norm, Part, Rotary
from benchmarks.recorder import recorded
from fusetune import ops


def norm(part: Norm, card: Card) -> list[Bound]:
    x, dy = (torch.zeros(part.m, part.n, dtype=card.dtype) for _ in range(2))
    weight = torch.zeros(part.n, dtype=card.dtype)
    with recorded(card) as works:
        y = ops.rms_norm(x.requires_grad_(), weight, 1e-5)
        torch.autograd.grad(y, x, dy)
    return [bound(work, card) for work in works]


def rotary(part: Rotary, card: Card) -> list[Bound]:
    batch, *heads, tokens, dim = part
    both = [torch.zeros(batch, tokens, h, dim, dtype=card.dtype).transpose(1, 2) for h in heads]
    cos, sin = (torch.zeros(batch, tokens, dim, dtype=card.dtype) for _ in range(2))
    upper = [torch.empty_like(x) for x in both]
    with recorded(card) as works:
        leaves = [x.requires_grad_() for x in both]
        torch.autograd.grad(ops.rotary(*leaves, cos, sin), leaves, upper)
    return [bound(work, card) for work in works]


def loss(part: Loss, card: Card) -> list[Bound]:
    logits = torch.zeros(part.m, part.v, dtype=card.dtype).requires_grad_()
    target, dloss = torch.zeros(part.m, dtype=torch.int64), torch.zeros(part.m)
    with recorded(card) as works:
        value = ops.cross_entropy(logits, target, reduction="none")
        torch.autograd.grad(value, logits, dloss)
    return [bound(work, card) for work in works]


def launches(part: Part, card: Card) -> list[Bound]:
    if isinstance(part, Norm):
        return norm(part, card)
    return rotary(part, card) if isinstance(part, Rotary) else loss(part, card)


def passes(card: Card) -> dict[str, Any]:
    """{name: {"launches", "others"}} of the parts."""
    return bound_adapters.passes(card, PARTS, launches)


def markdown(result: dict[str, Any]) -> str:
    """The README's table."""
    table = bound_adapters.table(result, "github", bound_adapters.IN_README, PARTS)
    return (
        "A model's norm, the rotary embedding of its positions and its loss, likewise, beside the "
        f"operators of transformers' models:\n\n{table}\n"
    )
