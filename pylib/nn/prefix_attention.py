"""Prefixes for the attention of transformers models, whatever attention function they run.

`attach` changes the name of the attention function in the model's configuration to one registered
here, which knows what to do with a prefix and calls the stock function where there is none. Within
`active` a forward pass of the model attends to a prefix:

    attach(model)
    with active(model, Prefix({"self": [(key, value) for each layer]}, length=P)):
        model(input_ids, attention_mask=attention_mask)

Keys and values are read where they are by ops.prefix_attention: no cache, no concatenation, no
wider mask. Tokens take positions from P on, as behind a cache of P tokens. The prefix of a forward
pass travels with its keyword arguments, so that layers that are recomputed later (gradient
checkpointing of both kinds) see the one they were computed with.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fusetune.nn import _prefix_interface, _prefix_layout, _prefix_stack

Tensor = torch.Tensor
_NAMES = "_fusetune_stacks"  # in the model: its stacks' names


@dataclass(frozen=True)
class Prefix:
    """The prefix of a forward pass.

    layers: for each place a prefix goes to (`places`), for each layer its keys and values, both
    [P, Hkv, D], or [G, P, Hkv, D] for G prefixes; or None for a layer without.
    length: P. rows: int64 [B], which of the G prefixes each row of the batch has, -1 for none; a
    batch of a multiple of B rows (beams) repeats each. lengths: how many of its P rows each prefix
    has. dropout_p: of the prefix's elements, while the model trains.
    counted: how many tokens of a prefix a two-dimensional attention mask has columns for already,
    in front, and the caller's position_ids count.
    """

    layers: Mapping[str, Sequence[tuple[Tensor, Tensor] | None]]
    length: int
    rows: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    dropout_p: float = 0.0
    counted: int = 0


def unsupported(model: nn.Module) -> str | None:
    """Why `attach` would refuse a model; None where it would not."""
    return _prefix_layout.unsupported(model)


def places(model: nn.Module) -> dict[str, int]:
    """Where a model can have a prefix -> number of layers there.

    "self" in a model of one stack; "encoder", "decoder" and "cross" in an encoder-decoder.
    """
    names = model.__dict__.get(_NAMES)
    if names is None:
        held = [list(stack.attention.values()) for stack in _prefix_layout.stacks(model)]
    else:
        held = [list(_prefix_stack.held(model.get_submodule(name))) for name in names]
    count: dict[str, int] = {}
    for place, layer in itertools.chain(*held):
        count[place] = max(count.get(place, 0), layer + 1)
    return count


def attach(model: nn.Module) -> None:
    """Makes a model's attention know prefixes. Once is enough; raises ValueError, see above."""
    if reason := unsupported(model):
        raise ValueError(f"model: {reason}")
    found = _prefix_layout.stacks(model)
    for stack in found:
        _prefix_stack.install(stack)
        _prefix_interface.switch(stack)
    model.__dict__[_NAMES] = tuple(stack.name for stack in found)


def detach(model: nn.Module) -> None:
    """Undoes `attach`; does nothing where there was none."""
    for name in model.__dict__.pop(_NAMES, ()):
        stack = model.get_submodule(name)
        _prefix_stack.remove(stack)
        _prefix_interface.switch_back(stack)


def attached(model: nn.Module) -> bool:
    """Whether `attach` is in force: not where the attention function was set anew since."""
    names = model.__dict__.get(_NAMES)
    return names is not None and all(
        _prefix_interface.switched(model.get_submodule(name)) for name in names
    )


def joined_reason(model: nn.Module) -> str | None:
    """Why keys and values are joined to the prefix for the stock function; None where they are not.

    Exact too, and without a cache, but with the copies. Single calls may need it for reasons that
    only they know: attention sinks, a cap on the scores, a bias that requires a gradient.
    """
    stacks = (model.get_submodule(name) for name in model.__dict__[_NAMES])
    return next(filter(None, map(_prefix_interface.joined_reason, stacks)), None)


@contextmanager
def active(model: nn.Module, prefix: Prefix) -> Iterator[None]:
    """Forward passes of an attached model within the with block have this prefix."""
    modules: list[Any] = [model.get_submodule(name) for name in model.__dict__[_NAMES]]
    before = [module.__dict__.get(_prefix_stack.ACTIVE) for module in modules]
    for module in modules:
        module.__dict__[_prefix_stack.ACTIVE] = prefix
    try:
        yield
    finally:
        for module, earlier in zip(modules, before, strict=True):
            module.__dict__[_prefix_stack.ACTIVE] = earlier
            if earlier is None:
                del module.__dict__[_prefix_stack.ACTIVE]
