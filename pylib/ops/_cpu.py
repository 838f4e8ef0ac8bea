"""Calls into the native CPU kernels: addresses for tensors, and what the kernels can do.

Everything here takes matrices whose rows are contiguous (`as_rows`) and arguments that have been
checked: a kernel gets bare addresses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fusetune import _native
from fusetune.ops._registry import OPS, Case
from fusetune.ops._weight import Weight
from fusetune.quantized_weight import QuantizedWeight
from fusetune.reference.codebook import codebook
from fusetune.reference.dropout import threshold_and_scale

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
QUANT_TYPE_CODES = {"nf4": 0, "fp4": 1}
_CPU = torch.device("cpu")
_BLOCK = 1 << 20  # bytes from which results lie in memory of our own: see csrc/blocks.h


def kernels() -> Any:
    """The native module. Only for implementations that `supports` has let through."""
    return _native.C


def supports(*needed: str) -> Callable[[Case], str | None]:
    """A `supports` for the CPU kernels of these names."""

    def reason(case: Case) -> str | None:
        if case.device != "cpu":
            return f"the tensors are on {case.device}"
        if _native.C is None:
            return _native.reason
        for dtype in (case.dtype, case.weight):
            if dtype is not None and dtype not in DTYPE_CODES:
                return f"no kernel for {dtype}"
        missing = [name for name in needed if not _native.C.has(name)]
        return f"{_native.C.isa()} has no kernel {missing[0]}" if missing else None

    return reason


def set_isa(name: str) -> None:
    """Forces an instruction set, or "auto". Raises ValueError where it is not available."""
    if _native.C is None:
        raise ValueError(_native.reason)
    if not _native.C.set_isa(name):
        why = _native.C.isa_unavailable_reason(name)
        raise ValueError(f"FUSETUNE_CPU_ISA {name!r} is not available: {why}")
    for op in OPS.values():
        op.forget()


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory for a kernel to write: on the CPU whatever the default device is, and real."""
    pooled = _native.C is not None and math.prod(shape) * dtype.itemsize >= _BLOCK
    if pooled and dtype in DTYPE_CODES:
        out: torch.Tensor = torch.from_dlpack(kernels().block(shape, DTYPE_CODES[dtype]))
    else:
        out = torch.empty(shape, dtype=dtype, device=_CPU)
    if type(out) is not torch.Tensor:
        raise RuntimeError(f"a kernel cannot write to a {type(out).__name__}: some mode is active")
    return out


def empty_cache() -> int:
    """Gives memory that is kept for the CPU kernels' next large results back to the system.

    Returns the bytes of it. What is kept was all in use at once at some time.
    """
    return 0 if _native.C is None else int(_native.C.release_blocks())


def matrix(rows: torch.Tensor) -> tuple[int, int, int]:
    """(address, distance of rows in elements, dtype) of a matrix with contiguous rows."""
    return rows.data_ptr(), rows.stride(0), DTYPE_CODES[rows.dtype]


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def heads(x: torch.Tensor | None) -> tuple[int, int, int, int, int]:
    """(address, distances of batch rows, heads and tokens, dtype) of x [B, H, T, D]."""
    if x is None:
        return (0, 0, 0, 0, 0)
    batch, head, token, _ = x.stride()
    return x.data_ptr(), batch, head, token, DTYPE_CODES[x.dtype]


def distances(x: torch.Tensor | None) -> tuple[int, ...]:
    """(address, distances in the first three dimensions) of an fp32 x [B, H, T] or [B, H, T, S]."""
    return (0, 0, 0, 0) if x is None else (x.data_ptr(), *x.stride()[:3])


def weight_4bit(w: QuantizedWeight) -> tuple[Any, ...]:
    """The kernels' description of a 4-bit weight; made once and kept with it."""
    known: tuple[Any, ...] | None = w.__dict__.get("_native")
    if known is not None:
        return known
    rows = w.shape[0] if w.shape else 1
    nested = w.nested_absmax is not None
    described = (
        w.packed.data_ptr(),
        codebook(w.quant_type, _CPU).data_ptr(),
        0 if nested else w.absmax.data_ptr(),
        w.absmax.data_ptr() if nested else 0,
        w.nested_code.data_ptr() if w.nested_code is not None else 0,
        w.nested_absmax.data_ptr() if w.nested_absmax is not None else 0,
        w.nested_offset.item() if w.nested_offset is not None else 0.0,
        w.nested_blocksize,
        w.blocksize,
        rows,
        w.numel() // rows if rows else 0,
    )
    object.__setattr__(w, "_native", described)
    return described


def weight(w: Weight) -> tuple[tuple[Any, ...] | None, tuple[int, int, int] | None]:
    """(4-bit, dense) arguments of `linear` and `linear_dx`: one of them is None."""
    if isinstance(w, torch.Tensor):
        return None, matrix(w)
    return weight_4bit(w), None


def dropout(p: float, seed: torch.Tensor | None) -> tuple[int, int, float] | None:
    """The kernels' description of a dropout."""
    return None if seed is None else (int(seed), *threshold_and_scale(p))


def fp32(tensor: torch.Tensor) -> torch.Tensor:
    """A small parameter as the kernels take it: fp32 and contiguous. Itself where it is so."""
    return tensor.detach().resolve_neg().float().contiguous()


def linear(
    rows: torch.Tensor,
    w: Weight,
    n: int,
    bias: torch.Tensor | None,
    tail: tuple[int, int, int, float] | None,
    int16: bool,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """rows [M, K] . w^T + bias (+ tail), in `dtype` or rows'. bias: fp32, contiguous."""
    m, k = rows.shape
    y = empty(m, n, dtype=dtype or rows.dtype)
    quantized, dense = weight(w)
    address = 0 if bias is None else bias.data_ptr()
    c = kernels()
    x_arg, y_arg = matrix(rows), matrix(y)
    done = (
        int16
        and quantized is not None
        and m <= 8
        and c.has("linear_4bit_int16")
        and c.linear_4bit_int16(x_arg, m, n, k, quantized, address, tail, y_arg)
    )
    if not done:
        c.linear(x_arg, m, n, k, quantized, dense, address, tail, y_arg)
    return y
