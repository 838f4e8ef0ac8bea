"""Inputs of a model, repeated along the batch: what Parallel does at its entry."""

from __future__ import annotations

from typing import Any

import torch

from fusetune.nn import cache_argument

# Where the batch's size is read, in this order.
_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "decoder_input_ids")


def repeat_inputs(
    args: tuple[Any, ...], kwargs: dict[str, Any], times: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a forward with every tensor of the batch's size repeated, block by block.

    Labels are too, so that a loss is the mean over all. Raises ValueError with a cache, which would
    grow by the repetition at every step.
    """
    if cache_argument.given(kwargs) is not None or kwargs.get("use_cache"):
        raise ValueError(
            "Parallel repeats inputs at every call, which does not go with a cache (generate()): "
            "repeat the inputs once and activate BatchSplit instead"
        )
    first = next((kwargs[name] for name in _INPUTS if kwargs.get(name) is not None), None)
    if first is None:
        first = next((arg for arg in args if isinstance(arg, torch.Tensor)), None)
    if first is None:
        raise ValueError(f"Parallel needs one of the inputs {_INPUTS} to know the batch's size")
    batch = first.shape[0]
    return _repeat(args, batch, times), _repeat(kwargs, batch, times)


def _repeat(value: Any, batch: int, times: int) -> Any:
    if isinstance(value, torch.Tensor):
        if value.dim() == 0 or value.shape[0] != batch:
            return value
        return value.repeat(times, *[1] * (value.dim() - 1))
    if isinstance(value, dict):
        return type(value)(**{key: _repeat(item, batch, times) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return type(value)([_repeat(item, batch, times) for item in value])
    return value
