"""Rows of a batch that have adapters of their own: tells a model's adapter layers their names.

For layers whose adapter is a vector: it becomes a matrix with one row for each row of the batch, in
one gather, instead of a part of the batch for each adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fusetune.nn.adapter_names import BASE, distinct, places
from fusetune.nn.checkpoint_guard import CheckpointGuard

Tensor = torch.Tensor
ROWS = "_fusetune_rows"  # in an adapter layer: the names, while rows have adapters of their own
_INPUTS = ("input_ids", "inputs_embeds", "inputs", "pixel_values", "input_values", "input_features")


def check_rows(
    adapter_names: Any, known: Iterable[str], args: Sequence[Any], kwargs: dict[str, Any]
) -> None:
    """Raises ValueError where names do not fit the adapters or the arguments of a forward."""
    distinct(adapter_names, known)
    given = [*args, *(kwargs.get(name) for name in _INPUTS)]
    batch = next((len(x) for x in given if isinstance(x, Tensor) and x.dim()), None)
    if not adapter_names or batch not in (None, len(adapter_names)):
        raise ValueError(
            f"adapter_names must name an adapter for each of {batch} rows, got {len(adapter_names)}"
        )


@contextlib.contextmanager
def rows_named(
    model: nn.Module, layers: Iterable[nn.Module], adapter_names: Sequence[str]
) -> Iterator[None]:
    """Within the with block `layers` find adapter_names under ROWS.

    What transformers checkpoints there finds them too when it is computed again, in the backward
    pass; what anything else checkpoints would not, and raises RuntimeError.
    """
    chosen, guard = list(layers), CheckpointGuard(model)

    @contextlib.contextmanager
    def named() -> Iterator[None]:
        before = [layer.__dict__.get(ROWS) for layer in chosen]
        for layer in chosen:
            layer.__dict__[ROWS] = adapter_names
        try:
            with guard.names_given():
                yield
        finally:
            for layer, names in zip(chosen, before, strict=True):
                if names is None:
                    layer.__dict__.pop(ROWS, None)
                else:
                    layer.__dict__[ROWS] = names

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is not None:
                module.__dict__["_gradient_checkpointing_func"] = _naming(function, named)
                stack.callback(module.__dict__.update, _gradient_checkpointing_func=function)
        stack.enter_context(guard.watching([*chosen, *_heads(model)]))
        stack.enter_context(named())
        yield


def _naming(
    checkpoint: Callable[..., Any], named: Callable[[], contextlib.AbstractContextManager[None]]
) -> Callable[..., Any]:
    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def again(*inputs: Any, **options: Any) -> Any:
            with named():
                return function(*inputs, **options)

        return checkpoint(again, *args, **kwargs)

    return run


@contextlib.contextmanager
def heads_by_row(model: nn.Module, adapter_names: Sequence[str] | None) -> Iterator[None]:
    """Lets each row of a batch have its own adapter's `modules_to_save`, such as the classifier."""

    def name_rows(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        names = list(adapter_names or ())
        beams = len(args[0]) // len(names) if args and names else 1  # one after the other
        return args, {**kwargs, "adapter_names": [name for name in names for _ in range(beams)]}

    with contextlib.ExitStack() as stack:
        for head in _heads(model) if adapter_names is not None else ():
            handle = head.register_forward_pre_hook(name_rows, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _heads(model: nn.Module) -> list[nn.Module]:
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]


def vectors(
    adapter_names: Sequence[str], known: dict[str, Tensor], base: Tensor, x: Tensor
) -> Tensor:
    """Each row's own vector, [B, 1, ..., F], for x [B, ..., *].

    known: vectors [F] by the names of adapters; base: that of rows whose adapter is none of them.
    Where x has several rows for each name (beams, or tokens that a layer has flattened into rows)
    they follow one another. Raises ValueError where they are not a multiple.
    """
    count = x.shape[0] if x.dim() > 1 else 1
    if count % len(adapter_names):
        raise ValueError(
            f"adapter_names names {len(adapter_names)} rows, but a layer has {count} of them"
        )
    chosen = [name if name in known else BASE for name in adapter_names]
    index = torch.tensor(places(chosen, list(known)), device=base.device) + 1
    index = index.repeat_interleave(count // len(adapter_names))
    rows = torch.stack([base, *known.values()])[index]
    return rows.view(count, *[1] * (x.dim() - 2), rows.shape[-1]) if x.dim() > 1 else rows[0]
