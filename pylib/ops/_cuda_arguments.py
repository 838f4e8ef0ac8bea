"""What a launcher of a CUDA kernel is given: addresses, descriptions, a workspace, the stream."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from fusetune.quantized_weight import QuantizedWeight
from fusetune.reference.codebook import codebook

Tensor = torch.Tensor
Tail = tuple[Tensor, Tensor, float]  # left [M, r] fp32, right, factor

ALIGNMENT = 16  # bytes a load takes


def described(w: QuantizedWeight) -> tuple[Any, ...]:
    """The launchers' description of a weight; made once and kept with it."""
    known: tuple[Any, ...] | None = w.__dict__.get("_cuda")
    if known is not None:
        return known
    rows = w.shape[0] if w.shape else 1
    found = (
        w.packed.data_ptr(),
        codebook(w.quant_type, w.device).data_ptr(),
        0 if w.nested else w.absmax.data_ptr(),
        w.absmax.data_ptr() if w.nested else 0,
        address(w.nested_code),
        address(w.nested_absmax),
        address(w.nested_offset),
        w.nested_blocksize,
        w.blocksize,
        rows,
        w.numel() // rows if rows else 0,
    )
    object.__setattr__(w, "_cuda", found)
    return found


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def fp32(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_neg().float().contiguous()


def low_rank(tail: Tail | None) -> Tail | None:
    return None if tail is None else (fp32(tail[0]), fp32(tail[1]), tail[2])


def addresses(tail: Tail | None) -> tuple[int, int, int, float] | None:
    if tail is None:
        return None
    left, right, factor = tail
    return left.data_ptr(), right.data_ptr(), left.shape[1], factor


def aligned(rows: Tensor) -> Tensor:
    """`rows`, or a copy of it, such that loads of 16 bytes can start at every row."""
    pitch = rows.stride(0) * rows.element_size()
    if rows.data_ptr() % ALIGNMENT == 0 and (pitch % ALIGNMENT == 0 or rows.shape[0] == 1):
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def workspace(splits: int, like: Tensor) -> Tensor | None:
    if splits == 1:
        return None
    return torch.empty((splits, like.numel()), dtype=torch.float32, device=like.device)


def on(device: torch.device) -> Any:
    """Makes `device` current where it is a GPU that is not."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def stream(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    current: int = torch.cuda.current_stream(device).cuda_stream
    return current
