"""A frozen weight, dense or 4-bit, as the flat list of arguments that torch.library wants."""

from __future__ import annotations

from typing import Any

import torch

from fusetune.quantized_weight import QuantizedWeight

Weight = torch.Tensor | QuantizedWeight

# A dense weight is `weight` alone: absmax is None then, and the rest means nothing.
SCHEMA = (
    "Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_code, "
    "Tensor? nested_offset, str quant_type, int blocksize, int nested_blocksize, int rows, int cols"
)
ARGUMENTS = SCHEMA.count(",") + 1


def flatten(weight: Weight) -> tuple[Any, ...]:
    """The arguments of SCHEMA for `weight`, a matrix."""
    if isinstance(weight, torch.Tensor):
        return weight, None, None, None, None, "", 0, 0, weight.shape[0], weight.shape[1]
    return (
        weight.packed,
        weight.absmax,
        weight.nested_absmax,
        weight.nested_code,
        weight.nested_offset,
        weight.quant_type,
        weight.blocksize,
        weight.nested_blocksize,
        weight.shape[0],
        weight.shape[1],
    )


def unflatten(arguments: tuple[Any, ...]) -> Weight:
    """Undoes `flatten`. The values were checked when the QuantizedWeight was made."""
    weight, absmax, nested_absmax, nested_code, nested_offset, quant_type, block, nested_block = (
        arguments[:8]
    )
    if absmax is None:
        dense: torch.Tensor = weight
        return dense
    return QuantizedWeight.unchecked(
        packed=weight,
        absmax=absmax,
        quant_type=quant_type,
        blocksize=block,
        shape=torch.Size(arguments[8:10]),
        dtype=torch.float32,  # of no meaning to a matmul
        nested_absmax=nested_absmax,
        nested_code=nested_code,
        nested_offset=nested_offset,
        nested_blocksize=nested_block,
    )


def as_rows(x: torch.Tensor, k: int) -> torch.Tensor:
    """x [..., K] as a matrix [M, K] whose rows are contiguous. Copies only where it has to."""
    x = x.resolve_neg()
    if x.dim() == 2 and x.stride(1) == 1:
        return x
    if k == 0:
        return x.new_empty(x.shape[:-1].numel(), 0)
    rows = x.reshape(-1, k)
    return rows if rows.stride(1) == 1 else rows.contiguous()
