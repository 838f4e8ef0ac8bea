"""Columns of a matrix times a vector, and the sums over rows that are the gradients of it.

On the native CPU kernel, or by torch on any device. Sums are taken in at least fp32, in an order
that depends on the shape alone, so that they are the same however many threads take part.
"""

from __future__ import annotations

from typing import Any

import torch

from fusetune import _native
from fusetune.ops import _cpu
from fusetune.ops._registry import backend, define, plain
from fusetune.ops._weight import as_rows

Tensor = torch.Tensor


def cpu_scale_columns(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """scale x + bias, [M, N] as x. scale, bias: fp32 [N], contiguous. out: x itself, or None."""
    m, n = x.shape
    y = _cpu.empty(m, n, dtype=x.dtype) if out is None else out
    added = 0 if bias is None else bias.data_ptr()
    _cpu.kernels().scale_columns(_cpu.matrix(x), m, n, scale.data_ptr(), added, _cpu.matrix(y))
    return y


def cpu_scale_columns_backward(
    dy: Tensor, x: Tensor | None, scale: Tensor | None, out: Tensor | None, need_dbias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dscale, dbias), fp32 [N]: sums over rows of dy x, where x is given, and of dy.

    scale dy is written to `out` where it is given; that may be dy itself.
    """
    m, n = dy.shape
    nothing = (0, 0, _cpu.DTYPE_CODES[dy.dtype])
    dscale = None if x is None else _cpu.empty(n, dtype=torch.float32)
    dbias = _cpu.empty(n, dtype=torch.float32) if need_dbias else None
    _cpu.kernels().scale_columns_backward(
        _cpu.matrix(dy),
        nothing if x is None else _cpu.matrix(x),
        m,
        n,
        0 if scale is None else scale.data_ptr(),
        nothing if out is None else _cpu.matrix(out),
        0 if dscale is None else dscale.data_ptr(),
        0 if dbias is None else dbias.data_ptr(),
    )
    return dscale, dbias


def summed_by(device: str, dtype: torch.dtype) -> str:
    """The backend of `column_sums`, for reports."""
    return "cpu" if device == "cpu" and _kernel_takes(dtype) else "torch"


def _kernel_takes(dtype: torch.dtype) -> bool:
    # Every instruction set has the kernel. Hot: to ask `_cpu.supports` takes longer than few sums.
    known = dtype in _cpu.DTYPE_CODES and _native.C is not None
    return known and backend() in ("auto", "cpu")


def column_sums(dy: Tensor) -> Tensor:
    """dy [M, N], rows contiguous, summed to [N] in fp32, float64 for float64. Differentiable."""
    traced = torch.compiler.is_compiling() or not plain(dy)
    if traced or (dy.requires_grad and torch.is_grad_enabled()):
        total: Tensor = _op(dy)
        return total
    return _sum(dy)


def _sum(dy: Tensor) -> Tensor:
    dtype = dy.dtype
    if not (dy.is_cpu and _kernel_takes(dtype)):
        return dy.sum(0, dtype=_acc(dy))
    m, n = dy.shape
    ld, step = dy.stride()
    if step != 1 or dy.is_neg():
        dy = as_rows(dy, n)
        ld = dy.stride(0)
    total = dy.new_empty(n, dtype=torch.float32)  # in half the time of _cpu.empty
    code = _cpu.DTYPE_CODES[dtype]
    _cpu.kernels().column_sums(dy.data_ptr(), ld, code, m, n, total.data_ptr())
    return total


def _acc(dy: Tensor) -> torch.dtype:
    return torch.float64 if dy.dtype == torch.float64 else torch.float32


# --- torch.library --------------------------------------------------------------------------------


def _fake(dy: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[1], dtype=_acc(dy))


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.shape, ctx.dtype = inputs[0].shape, inputs[0].dtype


def _backward(ctx: Any, dtotal: Tensor) -> Tensor:
    return dtotal.to(ctx.dtype).expand(ctx.shape)


_op = define("column_sums(Tensor dy) -> Tensor", _sum, _fake, _backward, _setup_context)
