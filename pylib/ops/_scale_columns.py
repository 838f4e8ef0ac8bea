"""Columns of a matrix times a vector, and the sums over rows that are the gradients of it.

On the native CPU kernel, or by torch on any device. Sums are taken in at least fp32, in an order
that depends on the shape alone, so that they are the same however many threads take part.
"""

from __future__ import annotations

import torch

from fusetune.ops import _cpu
from fusetune.ops._registry import Case, backend, plain

Tensor = torch.Tensor
_supports = _cpu.supports("scale_columns_backward")


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


def column_sums(dy: Tensor) -> Tensor:
    """dy [M, N], rows contiguous, summed to [N] in fp32, float64 for float64."""
    if _takes(dy):
        total = cpu_scale_columns_backward(dy, None, None, None, True)[1]
        assert total is not None
        return total
    return dy.sum(0, dtype=torch.float64 if dy.dtype == torch.float64 else torch.float32)


def summed_by(device: str, dtype: torch.dtype) -> str:
    """The backend of `column_sums`, for reports."""
    kernel = backend() in ("auto", "cpu") and _supports(Case(device, dtype)) is None
    return "cpu" if kernel else "torch"


def _takes(dy: Tensor) -> bool:
    """Whether the kernel sums a gradient: not one that is traced, or differentiated in turn."""
    return (
        not torch.compiler.is_compiling()
        and plain(dy)
        and not (torch.is_grad_enabled() and dy.requires_grad)
        and summed_by(dy.device.type, dy.dtype) == "cpu"
    )
