"""What is measured of prompt_embed: a batch's input, against look-up, repetition and torch.cat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from fusetune import ops

from .timing import Case, Result, Run

Tensor = torch.Tensor
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# The result is copied, or rounded once; the gradients are sums in fp32, rounded once.
TOLERANCE = {torch.float32: 5e-7, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def prompt_embed(
    batch: int,
    tokens: int,
    length: int,
    hidden: int,
    vocabulary: int,
    dtype: torch.dtype,
    *,
    train_weight: bool = False,
    scale: float = 1.0,
    positions: list[int] | None = None,
    rows: list[int] | None = None,
) -> Case:
    """Forward and backward to the prompt, in fp32, and with `train_weight` to the embeddings.

    rows: several prompts, and which of them each row of the batch has.
    """
    ids = torch.randint(vocabulary, (batch, tokens))
    weight = torch.randn(vocabulary, hidden).to(dtype)
    prompt = torch.randn(max(rows) + 1 if rows else 1, length, hidden)
    upper = torch.randn(batch, length + tokens, hidden).to(dtype)
    slots = None if positions is None else torch.tensor(positions)
    chosen = None if rows is None else torch.tensor(rows)

    def run(embed: Any, dtype: torch.dtype, prompt_dtype: torch.dtype) -> Run:
        table = weight.to(dtype)
        first = prompt.to(prompt_dtype)

        def call() -> Result:
            leaves = [first.detach().requires_grad_(), table.detach().requires_grad_(train_weight)]
            out = embed(leaves[1], leaves[0])
            needed = leaves if train_weight else leaves[:1]
            return out.detach(), *torch.autograd.grad(out, needed, upper.to(dtype))

        return call

    def ours(table: Tensor, first: Tensor) -> Tensor:
        return ops.prompt_embed(ids, table, first, positions=slots, rows=chosen, scale=scale)

    def composed(table: Tensor, first: Tensor) -> Tensor:
        looked_up = functional.embedding(ids, table) * scale
        each = first.repeat(batch, 1, 1) if chosen is None else _chosen(first, chosen)
        joined = torch.cat((each.to(table.dtype), looked_up), 1)
        return joined if slots is None else joined[:, _order(slots, length + tokens)]

    notes = ", weight too" if train_weight else ""
    notes += ", in slots" if positions else ""
    notes += f", {len(prompt)} prompts" if rows else ""
    return Case(
        op="prompt_embed",
        name=f"forward + backward {NAMES[dtype]}{notes}",
        shape=f"{batch} × ({length} + {tokens}) × {hidden}",
        ours=run(ours, dtype, torch.float32),
        peers={"torch": run(composed, dtype, torch.float32)},
        exact=run(composed, torch.float64, torch.float64),
        tolerance=TOLERANCE[dtype],
    )


def _chosen(prompts: Tensor, rows: Tensor) -> Tensor:
    return prompts[rows.clamp(min=0)].where((rows >= 0)[:, None, None], 0)


def _order(slots: Tensor, places: int) -> Tensor:
    """Which of [prompt | tokens] comes to each place."""
    taken = torch.zeros(places, dtype=torch.bool)
    taken[slots] = True
    order = torch.empty(places, dtype=torch.int64)
    order[taken] = torch.arange(len(slots))
    order[~taken] = torch.arange(len(slots), places)
    return order


def prompt_embed_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    """Of the sizes of SmolLM2-135M and of a model ten times as wide, whatever the caller's."""
    fp32, bf16 = torch.float32, torch.bfloat16
    yield prompt_embed(8, 128, 20, 576, 49152, fp32)
    if full:
        yield prompt_embed(8, 128, 100, 576, 49152, fp32)
        yield prompt_embed(8, 512, 20, 4096, 32000, fp32)
        yield prompt_embed(8, 512, 20, 4096, 32000, bf16)
        yield prompt_embed(8, 128, 20, 576, 49152, fp32, train_weight=True)
        yield prompt_embed(8, 128, 6, 576, 49152, fp32, positions=[0, 1, 2, 60, 61, 62])


def small_cases(dtype: torch.dtype) -> Iterator[Case]:
    """What `fusetune verify` checks: a rest of columns, slots, rows without a prompt."""
    yield prompt_embed(3, 7, 5, 67, 50, dtype, train_weight=True, scale=3.25)
    yield prompt_embed(3, 7, 5, 67, 50, dtype, positions=[0, 2, 3, 9, 11], rows=[1, -1, 0])
