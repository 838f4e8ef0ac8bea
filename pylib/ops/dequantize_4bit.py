"""dequantize_4bit: a `QuantizedWeight` to a dense tensor."""

from __future__ import annotations

from typing import Any

import torch

from fusetune.ops import _cpu, _cuda, _triton
from fusetune.ops._registry import Impl, Op, define, plain
from fusetune.ops._weight import SCHEMA, flatten, unflatten
from fusetune.quantized_weight import QuantizedWeight
from fusetune.reference import dequantize_4bit as reference


def dequantize_4bit(
    w: QuantizedWeight, dtype: torch.dtype | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The dense weight, of w's shape, in `dtype` (w.dtype, or out's, where it is None).

    Values equal bitsandbytes': codebook value times absmax in fp32, then rounded to `dtype`.
    out: written instead of a new tensor, and returned; contiguous, of w's shape and device.

    Raises TypeError for a dtype that is not floating point, ValueError for an `out` that does not
    fit.
    """
    if not isinstance(w, QuantizedWeight):
        raise TypeError(f"w must be a QuantizedWeight, got {type(w).__name__}")
    if dtype is None:
        dtype = w.dtype if out is None else out.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
    if out is not None:
        _check_out(out, w, dtype)
    matrix = w if len(w.shape) == 2 else _as_matrix(w)
    if torch.compiler.is_compiling() or not plain(w.packed):
        if out is None:
            dense: torch.Tensor = _op(*flatten(matrix), dtype).view(w.shape)
            return dense
        _op_out(*flatten(matrix), out)
        return out
    target = torch.empty(w.shape, dtype=dtype, device=w.device) if out is None else out
    _write(matrix, target)
    return target


def _as_matrix(w: QuantizedWeight) -> QuantizedWeight:
    """The same tensors seen as one row, for weights of other than two dimensions."""
    fields = {name: getattr(w, name) for name in w.__dataclass_fields__}
    return QuantizedWeight.unchecked(**{**fields, "shape": torch.Size((1, w.numel()))})


def _check_out(out: torch.Tensor, w: QuantizedWeight, dtype: torch.dtype) -> None:
    if out.dtype != dtype:
        raise ValueError(f"out must be {dtype}, got {out.dtype}")
    if out.shape != w.shape or out.device != w.device:
        raise ValueError(
            f"out must have shape {tuple(w.shape)} on {w.device}, "
            f"got {tuple(out.shape)} on {out.device}"
        )
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out must not require grad: a dequantised weight has no gradient")


def _cpu_write(w: QuantizedWeight, out: torch.Tensor) -> None:
    code = _cpu.DTYPE_CODES[out.dtype]
    _cpu.kernels().dequantize_4bit(_cpu.weight_4bit(w), out.data_ptr(), code)


def _cuda_write(w: QuantizedWeight, out: torch.Tensor) -> None:
    if _cuda.reads(w) is None:
        _cuda.dequantize_4bit(w, out)
    else:
        _reference_write(w, out)


def _reference_write(w: QuantizedWeight, out: torch.Tensor) -> None:
    out.copy_(reference.dequantize_4bit(w, out.dtype).view(out.shape))


OP = Op(
    "dequantize_4bit",
    Impl("cuda", _cuda_write, _cuda.supports, 30),
    Impl("triton", _triton.dequantize_4bit, _triton.supports, 20),
    Impl("cpu", _cpu_write, _cpu.supports("dequantize_4bit"), 10),
    Impl("reference", _reference_write, lambda case: None, 0),
)


def _write(w: QuantizedWeight, out: torch.Tensor) -> None:
    OP.run(out.device.type, out.dtype, None)(w, out)


def _run(*args: Any) -> torch.Tensor:
    w = unflatten(args[:-1])
    assert isinstance(w, QuantizedWeight)
    out = torch.empty(w.shape, dtype=args[-1], device=w.device)
    _write(w, out)
    return out


def _run_out(*args: Any) -> None:
    w = unflatten(args[:-1])
    assert isinstance(w, QuantizedWeight)
    _write(w, args[-1])


def _fake(packed: torch.Tensor, *args: Any) -> torch.Tensor:
    rows, cols, dtype = args[-3:]
    return packed.new_empty(rows, cols, dtype=dtype)


_op = define(f"dequantize_4bit({SCHEMA}, ScalarType dtype) -> Tensor", _run, _fake)
_op_out = define(
    f"dequantize_4bit_out({SCHEMA}, Tensor(a!) out) -> ()", _run_out, lambda *args: None
)
