"""What the active composition makes of one sub-layer's output.

A State goes through the tree. Every adapter prepares its own input from the hidden state that the
one before left; in blocks with children side by side the first adapter's preparation serves all, so
that a Stack inside one prepares anew, on what that preparation gave: as in the library `adapters`,
whose checkpoints were trained so. Where an adapter has no module at a layer (`leave_out`, or a
location that its config leaves off), its part of the hidden state stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fusetune.methods.bottleneck.adapter import BottleneckAdapter, groupable, grouped
from fusetune.methods.bottleneck.composition import (
    Average,
    BatchSplit,
    Fuse,
    Node,
    Parallel,
    Split,
    Stack,
    adapters_in,
)

Tensor = torch.Tensor


@dataclass(frozen=True)
class Site:
    """What one location offers: its adapters and fusions by name, its LayerNorm or None.

    query_before_norm: for each fusion, whether its query is h itself.
    """

    adapters: Mapping[str, Any]
    fusions: Mapping[str, Any]
    query_before_norm: Mapping[str, bool]
    norm: Callable[[Tensor], Tensor] | None

    def has(self, tree: str | Node) -> bool:
        """Whether any adapter of a composition is here."""
        return any(name in self.adapters for name in adapters_in(tree))

    def present(self, tree: str | Node) -> list[str]:
        """Those that are here, from left to right."""
        return [name for name in adapters_in(tree) if name in self.adapters]


@dataclass(frozen=True)
class State:
    """hidden: the result so far [B, T, H]; base: h; stream: r, or None where nobody reads it.

    last: the adapter applied last.
    """

    hidden: Tensor
    base: Tensor
    stream: Tensor | None
    last: str = ""

    def cut(self, dim: int, start: int, size: int) -> State:
        """A part of the batch (dim 0) or of the sequence (dim 1)."""
        return replace(
            self,
            hidden=self.hidden.narrow(dim, start, size),
            base=self.base.narrow(dim, start, size),
            stream=None if self.stream is None else self.stream.narrow(dim, start, size),
        )


def evaluate(tree: str | Node, state: State, site: Site) -> State:
    """The state after a composition of which something is here."""
    if isinstance(tree, str):
        adapter = site.adapters[tree]
        x, residual = adapter.enter(state.hidden, state.stream, site.norm)
        return _apply(tree, x, residual, state, site)
    if isinstance(tree, Stack):
        for child in tree.children:
            if site.has(child):
                state = evaluate(child, state, site)
        return state
    if isinstance(tree, Fuse):
        return _fuse(tree, state, site)
    x, residual = site.adapters[site.present(tree)[0]].enter(state.hidden, state.stream, site.norm)
    if isinstance(tree, Average):
        return _average(tree, x, residual, state, site)
    dim = 1 if isinstance(tree, Split) else 0
    sizes = _sizes(tree, state.hidden)
    together = dim == 0 and _adapters_for_one_call(tree, site)
    if together:
        hidden = grouped(
            together, x, state.base if together[0].config.is_parallel else residual, sizes
        )
        return replace(state, hidden=hidden, last=str(tree.children[-1]))
    start, parts = 0, []
    for child, size in zip(tree.children, sizes, strict=True):
        inputs = (x.narrow(dim, start, size), residual.narrow(dim, start, size))
        parts.append(_child(child, *inputs, state.cut(dim, start, size), site))
        start += size
    hidden = torch.cat([part.hidden for part in parts], dim)
    return replace(state, hidden=hidden, last=_last_applied(parts))


def _apply(name: str, x: Tensor, residual: Tensor, state: State, site: Site) -> State:
    return replace(state, hidden=site.adapters[name](x, residual, state.base), last=name)


def _child(child: str | Node, x: Tensor, residual: Tensor, state: State, site: Site) -> State:
    """A child of a block: a name takes the block's prepared input, a composition prepares anew."""
    if not site.has(child):
        return replace(state, last="")
    if isinstance(child, str):
        return _apply(child, x, residual, state, site)
    return evaluate(child, replace(state, hidden=x), site)


def _last_applied(parts: Sequence[State]) -> str:
    return next(part.last for part in reversed(parts) if part.last)


def _average(tree: Average, x: Tensor, residual: Tensor, state: State, site: Site) -> State:
    parts = [_child(child, x, residual, state, site) for child in tree.children]
    hidden = sum(
        (weight * part.hidden for weight, part in zip(tree.weights[1:], parts[1:], strict=True)),
        tree.weights[0] * parts[0].hidden,
    )
    return replace(state, hidden=hidden, last=_last_applied(parts))


def _fuse(tree: Fuse, state: State, site: Site) -> State:
    """The last adapter's preparation serves all children, the query and the residual."""
    name = site.present(tree)[-1]
    adapter: BottleneckAdapter = site.adapters[name]
    x, residual = adapter.enter(state.hidden, state.stream, site.norm)
    query = x
    if site.query_before_norm[str(tree.name)] and not adapter.config.is_parallel:
        query = state.hidden
    inner = replace(state, hidden=x)
    values = [_output(child, inner, site) for child in tree.children if site.has(child)]
    hidden, _ = site.fusions[str(tree.name)](query, values, residual)
    if adapter.config.is_parallel:
        hidden = hidden + state.base
    return replace(state, hidden=hidden, last=name)


def _output(child: str | Node, state: State, site: Site) -> Tensor:
    """A(x) of a fusion's child: of an adapter on the prepared input, or of a Stack's last one."""
    if isinstance(child, str):
        output: Tensor = site.adapters[child].output(state.hidden)
        return output
    *below, top = site.present(child)
    for name in below:
        state = evaluate(name, state, site)
    x, _ = site.adapters[top].enter(state.hidden, state.stream, site.norm)
    output = site.adapters[top].output(x)
    return output


def _sizes(tree: Node, hidden: Tensor) -> list[int]:
    """How many sequences, or tokens for a Split, each child gets."""
    if isinstance(tree, Parallel):
        count, batch = len(tree.children), hidden.shape[0]
        if batch % count:
            raise ValueError(f"{tree}: the batch of {batch} is not {count} equal parts")
        return [batch // count] * count
    if isinstance(tree, BatchSplit):
        if sum(tree.batch_sizes) != hidden.shape[0]:
            raise ValueError(f"{tree}: batch_sizes must sum to the batch, {hidden.shape[0]}")
        return tree.batch_sizes
    assert isinstance(tree, Split)
    if sum(tree.splits) != hidden.shape[1]:
        raise ValueError(f"{tree}: splits must sum to the sequence's length, {hidden.shape[1]}")
    return tree.splits


def _adapters_for_one_call(tree: Node, site: Site) -> list[BottleneckAdapter]:
    """The children, if they are adapters that one grouped call serves; else none."""
    names = [child for child in tree.children if isinstance(child, str) and child in site.adapters]
    if len(names) < len(tree.children):
        return []
    adapters = [site.adapters[name] for name in names]
    alike = len({adapter.config.is_parallel for adapter in adapters}) == 1
    return adapters if alike and groupable(adapters) else []
