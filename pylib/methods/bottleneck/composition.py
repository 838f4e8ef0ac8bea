"""How active adapters are put together: Stack, Fuse, Split, Parallel, BatchSplit, Average.

Names and arguments are those of the library `adapters`. A node's children are names of adapters or
nodes; which node may be in which is checked when a composition is activated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


class Node:
    """A composition. children: names, or nodes."""

    def __init__(self, *children: str | Node) -> None:
        if not children:
            raise ValueError(f"{type(self).__name__} needs at least one adapter")
        for child in children:
            if not isinstance(child, str | Node):
                raise TypeError(f"{type(self).__name__}: {child!r} is no name and no composition")
        self.children = children

    def __repr__(self) -> str:
        extra = [f"{k}={v!r}" for k, v in vars(self).items() if k != "children" and v is not None]
        return f"{type(self).__name__}({', '.join([*map(repr, self.children), *extra])})"


class Stack(Node):
    """One after the other: each gets the result of the one before."""


class Fuse(Node):
    """Attention over the children's outputs, by a trained fusion.

    name: the fusion's (an adapter with an AdapterFusionConfig); None: the one over these adapters.
    """

    def __init__(self, *children: str | Node, name: str | None = None) -> None:
        super().__init__(*children)
        self.name = name


class Split(Node):
    """The sequence is cut: `splits` tokens for each child, one number for all or a list."""

    def __init__(self, *children: str | Node, splits: int | Sequence[int]) -> None:
        super().__init__(*children)
        self.splits = _sizes("splits", splits, len(children))


class BatchSplit(Node):
    """The batch is cut: `batch_sizes` sequences for each child, one number for all or a list."""

    def __init__(self, *children: str | Node, batch_sizes: int | Sequence[int]) -> None:
        super().__init__(*children)
        self.batch_sizes = _sizes("batch_sizes", batch_sizes, len(children))


class Parallel(Node):
    """The model runs for each child: inputs are repeated, all for the first child come first."""


class Average(Node):
    """The weighted mean of the children's results.

    weights: one for each child, default all equal; divided by their sum with normalize_weights.
    """

    def __init__(
        self,
        *children: str | Node,
        weights: Sequence[float] | None = None,
        normalize_weights: bool = True,
    ) -> None:
        super().__init__(*children)
        values = [1.0] * len(children) if weights is None else [float(w) for w in weights]
        if len(values) != len(children):
            raise ValueError(f"weights must be {len(children)} numbers, got {weights}")
        total = sum(values) if normalize_weights or weights is None else 1.0
        if total == 0:
            raise ValueError(f"weights must not sum to zero, got {weights}")
        self.weights = [value / total for value in values]


def _sizes(name: str, sizes: int | Sequence[int], count: int) -> list[int]:
    values = [sizes] * count if isinstance(sizes, int) else list(sizes)
    if len(values) != count or not all(isinstance(n, int) and n >= 0 for n in values):
        raise ValueError(f"{name} must be a number or {count} numbers, none negative, got {sizes}")
    return values


# What may stand in what, besides names. (Below the first level adapters takes names and Stacks
# only; here this table is all.)
_ALLOWED: dict[type[Node], tuple[type[Node], ...]] = {
    Stack: (Fuse, Split, Parallel, BatchSplit, Average),
    Fuse: (Stack,),
    Split: (Split, Stack, BatchSplit, Average),
    Parallel: (Stack, BatchSplit, Average),
    BatchSplit: (Stack, Split, BatchSplit, Average),
    Average: (Stack, Split, BatchSplit),
}


def adapters_in(tree: str | Node) -> Iterator[str]:
    """Names of all bottleneck adapters, from left to right."""
    if isinstance(tree, str):
        yield tree
        return
    for child in tree.children:
        yield from adapters_in(child)


def first(tree: str | Node) -> str:
    """The leftmost adapter, whose invertible block is used."""
    return tree if isinstance(tree, str) else first(tree.children[0])


def last(tree: str | Node) -> str:
    """The rightmost adapter."""
    return tree if isinstance(tree, str) else last(tree.children[-1])


def nodes_in(tree: str | Node) -> Iterator[Node]:
    """All nodes, the outermost first."""
    if isinstance(tree, Node):
        yield tree
        for child in tree.children:
            yield from nodes_in(child)


def trained_names(tree: str | Node) -> list[str]:
    """What PEFT is to call active: adapters, but of a fusion the fusion alone."""
    if isinstance(tree, str):
        return [tree]
    if isinstance(tree, Fuse):
        return [str(tree.name)]
    names = [name for child in tree.children for name in trained_names(child)]
    return list(dict.fromkeys(names))


def resolve(tree: str | Node | Sequence[str], configs: Mapping[str, Any]) -> Node:
    """A checked composition of what a model has: names of fusions become Fuse, Fuse gets its name.

    configs: those of the model's adapters. A name or a list of names is a Stack. Raises ValueError
    naming what does not fit.
    """
    if isinstance(tree, str):
        tree = Stack(tree)
    elif not isinstance(tree, Node):
        tree = Stack(*tree)
    resolved = _resolve(tree, configs)
    if not isinstance(resolved, Stack | Fuse):
        resolved = Stack(resolved)
    for node in nodes_in(resolved):
        if isinstance(node, Parallel) and node not in resolved.children:
            raise ValueError(f"{tree}: Parallel may only be in the outermost Stack")
    if sum(isinstance(node, Parallel) for node in nodes_in(resolved)) > 1:
        raise ValueError(f"{tree}: there may be one Parallel only")
    return resolved


def _resolve(tree: Node, configs: Mapping[str, Any]) -> Node:
    children: list[str | Node] = []
    for child in tree.children:
        if isinstance(child, str):
            child = _known(child, configs, tree)
        if isinstance(child, Node):
            if type(child) not in _ALLOWED[type(tree)]:
                raise ValueError(f"{type(child).__name__} is not allowed in {tree}")
            if isinstance(tree, Fuse) and any(isinstance(c, Node) for c in child.children):
                raise ValueError(f"{tree}: a Stack in a Fuse is of adapters only")
            child = _resolve(child, configs)
        children.append(child)
    copy = object.__new__(type(tree))
    copy.__dict__.update(tree.__dict__, children=tuple(children))
    if isinstance(copy, Fuse):
        copy.name = _fusion(copy, configs)
    elif not isinstance(copy, Stack):
        _check_agreement(copy, configs)
    return copy


def _known(name: str, configs: Mapping[str, Any], tree: Node) -> str | Node:
    if name not in configs:
        raise ValueError(f"{tree}: there is no adapter {name!r}, only {sorted(configs)}")
    fused = getattr(configs[name], "adapters", None)
    return name if fused is None else Fuse(*fused, name=name)


def _fusion(tree: Fuse, configs: Mapping[str, Any]) -> str:
    """The name of the fusion that a Fuse takes."""
    members = [last(child) for child in tree.children]
    fusions = {n: list(c.adapters) for n, c in configs.items() if hasattr(c, "adapters")}
    if tree.name is not None:
        if fusions.get(tree.name) != members:
            raise ValueError(f"{tree}: {tree.name!r} is no fusion of {members}, only {fusions}")
        return tree.name
    found = [name for name, adapters in fusions.items() if adapters == members]
    if len(found) != 1:
        what = "no fusion" if not found else f"more than one fusion ({found}, give name=)"
        raise ValueError(f"{tree}: the model has {what} of {members}; it has {fusions}")
    return found[0]


def _check_agreement(tree: Node, configs: Mapping[str, Any]) -> None:
    """Children side by side are closed by one and the same LayerNorm, or by none."""
    values = {name: configs[name].original_ln_after for name in map(last, tree.children)}
    if len(set(values.values())) > 1:
        raise ValueError(f"{tree}: adapters differ in original_ln_after: {values}")
