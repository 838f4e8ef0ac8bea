"""Bottleneck adapters, their fusion and prefixes: what bound.py predicts of their kernels.

Each layer of ledgers_adapters.LAYERS forward and backward, in 16 bits; of prefix attention the two
ops that merge the prefix, and torch's attention to the tokens as an operator, as it is torch's.
Operands are zeros: a kernel's logarithm takes other paths for other numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.bound_launch import Bound, bound, described, least_time, ledger, of_operator
from benchmarks.cards import Card
from benchmarks.ledgers_adapters import LAYERS, Bottleneck, Fusion, Layer, Prefix
from benchmarks.recorder import recorded
from fusetune import ops
from fusetune.ops import _bottleneck, _prefix_attention
from fusetune.ops._registry import Case
from fusetune.reference.prefix_attention import Options

IN_README = ("A100", "H100")  # of the cards, by whose sum each row can be estimated
OTHERS = ("torch", "the least")


def bottleneck(layer: Bottleneck, card: Card) -> list[Bound]:
    """ops.bottleneck with a residual of its own and both biases."""
    m, h, d = layer
    shapes = (m, h), (d, h), (d,), (h, d), (h,), (m, h)
    *leaves, residual = (torch.zeros(s, dtype=card.dtype).requires_grad_() for s in shapes)
    dy = torch.zeros(m, h, dtype=card.dtype)
    with recorded(card) as works:
        y = ops.bottleneck(*leaves, residual=residual)  # type: ignore[arg-type]
        torch.autograd.grad(y, [*leaves, residual], dy)
    return [bound(work, card) for work in works]


def fusion(layer: Fusion, card: Card) -> list[Bound]:
    """ops.adapter_fusion with every weight and a residual."""
    m, n, h = layer
    shapes = (h, h), (h,), (h, h), (h,), (h, h), *[(m, h)] * (n + 2)
    leaves = [torch.zeros(s, dtype=card.dtype).requires_grad_() for s in shapes]
    query, residual, *outputs = leaves[5:]
    dy = torch.zeros(m, h, dtype=card.dtype)
    with recorded(card) as works:
        y = ops.adapter_fusion(query, outputs, *leaves[:5], residual=residual)
        torch.autograd.grad(y, leaves, dy)
    return [bound(work, card) for work in works]


def prefix(layer: Prefix, card: Card) -> list[Bound]:
    """The prefix merged into attention to the tokens, and its part of the gradients."""
    works = merged(layer, card)
    forward, backward = (of_operator(operator, card) for operator in layer.base())
    first, *rest = (bound(work, card) for work in works)
    return [forward, first, backward, *rest]


def merged(layer: Prefix, card: Card) -> list[Any]:
    """Works of the ops prefix_attend and prefix_attend_backward."""
    batch, heads, heads_kv, tokens, dim, count, wide = layer
    kind = torch.float32 if wide == 4 else card.dtype

    def rows() -> torch.Tensor:
        return torch.zeros(batch, tokens, heads, dim, dtype=card.dtype).transpose(1, 2)

    query, out, dout, dquery = (rows() for _ in range(4))
    keys = [torch.zeros(1, count, heads_kv, dim, dtype=kind) for _ in range(2)]
    lse, options = torch.zeros(batch, heads, tokens), Options(scale=dim**-0.5)
    with recorded(card) as works:
        ops_of = (_prefix_attention.OP, _prefix_attention.OP_BACKWARD)
        forward, backward = (op.run("cpu", card.dtype, kind) for op in ops_of)
        forward(query, *keys, out, lse, options)
        backward(dout, query, *keys, out, lse, options, dquery, True, True)
    return works


def launches(layer: Layer, card: Card) -> list[Bound] | None:
    """None where no kernel of ours is offered on the card."""
    if isinstance(layer, Bottleneck):
        with recorded(card):
            offered = _bottleneck.OP.select(Case("cpu", card.dtype, card.dtype)).name
        return bottleneck(layer, card) if offered == "triton" else None
    return fusion(layer, card) if isinstance(layer, Fusion) else prefix(layer, card)


def passes(
    card: Card, layers: Iterable[Any] = LAYERS, of: Callable[..., list[Bound] | None] = launches
) -> dict[str, Any]:
    """{name: {"launches", "others"}} of the layers, whose launches `of` gives."""
    found = {}
    for layer in layers:
        print(f"{card.name}: {layer.name}", file=sys.stderr)
        ours = of(layer, card)
        if ours is None:
            continue
        others = (layer.eager(), layer.least())
        found[layer.name] = {
            "launches": [described(b) for b in ours],
            "others": {k: ledger(o, card) for k, o in zip(OTHERS, others, strict=True)},
        }
    return found


def table(
    result: dict[str, Any],
    form: str = "simple",
    chosen: Iterable[str] = (),
    layers: Iterable[Any] = LAYERS,
) -> str:
    """MB, and µs at least, of each layer forward and backward; `chosen`: of these cards only."""
    rows = []
    for layer in layers:
        for card in chosen or result["cards"]:
            one = result["cards"][card]["passes"].get(layer.name)
            if one is None:
                rows.append([card, layer.name, "no kernel", *[""] * len(OTHERS)])
                continue
            moved = sum(launch["bytes"] for launch in one["launches"])
            ours = {"bytes": moved, "seconds": sum(map(least_time, one["launches"]))}
            sums = [ours, *(one["others"][name] for name in OTHERS)]
            cells = [f"{s['bytes'] / 1e6:.0f} MB, {1e6 * s['seconds']:.0f} µs" for s in sums]
            rows.append([card, layer.name, *cells])
    headers = ["*predicted*", "layer", "fusetune", *OTHERS]
    return str(tabulate(rows, headers=headers, tablefmt=form, disable_numparse=True))


def markdown(result: dict[str, Any]) -> str:
    """The README's table."""
    return (
        "Bottleneck adapters, fusion and prefix attention, forward and backward in 16 bits: bytes "
        "that move, and the least time that follows. Of `torch`'s operators only memory and tensor "
        "cores are known; torch's attention to the tokens is counted likewise in both columns:\n\n"
        f"{table(result, 'github', IN_README)}\n"
    )
