"""ia3_linear on the native kernels and on a GPU.

Keys and values: on a GPU the vector is applied where the matmul writes its result; on the CPU one
pass over it follows. Feed-forward layers: the input is scaled in one pass, and nothing of it is
kept. Backward, one pass over dy (or over dy W) gives both what goes on and the vector's gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import linear

from fusetune.ops import _cpu, _gpu_linear, _lora_linear_cpu, _triton
from fusetune.ops._registry import Impl
from fusetune.ops._scale_columns import (
    column_sums,
    cpu_scale_columns,
    cpu_scale_columns_backward,
)
from fusetune.ops._weight import Weight

Tensor = torch.Tensor


# As `cpu_scale_columns_backward`.
Columns = Callable[
    [Tensor, Tensor | None, Tensor, Tensor | None, bool], tuple[Tensor | None, Tensor | None]
]


def _backward(
    columns: Columns,
    base_dx: Callable[[Tensor, Weight], Tensor],
    dy: Tensor,
    x: Tensor | None,
    weight: Weight,
    scale: Tensor,
    bias: Tensor | None,
    z: Tensor,
    feedforward: bool,
    need_dx: bool,
    need_dscale: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    factor = _cpu.fp32(scale)
    dx = dscale = total = None
    if feedforward:
        total = column_sums(dy) if need_dbias else None
        if need_dx or need_dscale:
            g = base_dx(dy, weight)
            dx = g if need_dx else None
            dscale, _ = columns(g, x if need_dscale else None, factor, dx, False)
    else:
        dz = _like(dy) if need_dx else None
        need_total = need_dbias or (need_dscale and bias is not None)
        if need_dx or need_dscale or need_total:
            dscale, total = columns(dy, z if need_dscale else None, factor, dz, need_total)
        if dscale is not None and bias is not None and total is not None:
            dscale = dscale + bias.detach() * total
        total = total * factor if need_dbias and total is not None else None
        dx = None if dz is None else base_dx(dz, weight)
    return (
        dx,
        None if dscale is None else dscale.to(scale.dtype),
        None if total is None or bias is None else total.to(bias.dtype),
    )


def _like(rows: Tensor) -> Tensor:
    """Memory for a matrix of the same shape and dtype, without gaps."""
    if rows.device.type == "cpu":
        return _cpu.empty(*rows.shape, dtype=rows.dtype)
    return torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)


# --- CPU ------------------------------------------------------------------------------------------


def _cpu_forward(
    rows: Tensor,
    weight: Weight,
    scale: Tensor,
    bias: Tensor | None,
    feedforward: bool,
    keep_z: bool,
) -> tuple[Tensor, Tensor]:
    factor, nothing = _cpu.fp32(scale), rows.new_empty(0)
    if feedforward:
        return _cpu_product(cpu_scale_columns(rows, factor), weight, bias), nothing
    z = _cpu_product(rows, weight, None)
    added = None if bias is None else factor * _cpu.fp32(bias)
    y = cpu_scale_columns(z, factor, added, None if keep_z else z)
    return y, z if keep_z else nothing


def _cpu_product(rows: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """rows W^T + bias, in rows' dtype."""
    if isinstance(weight, Tensor) and _lora_linear_cpu.torch_multiplies(rows, weight):
        return linear(rows, weight, None if bias is None else bias.detach().to(rows.dtype))
    added = None if bias is None else _cpu.fp32(bias)
    dense = _lora_linear_cpu.with_contiguous_rows(weight)
    return _cpu.linear(rows, dense, weight.shape[0], added, None, False)


# --- GPU ------------------------------------------------------------------------------------------


def _gpu_forward(
    rows: Tensor,
    weight: Weight,
    scale: Tensor,
    bias: Tensor | None,
    feedforward: bool,
    keep_z: bool,
) -> tuple[Tensor, Tensor]:
    factor, nothing = _cpu.fp32(scale), rows.new_empty(0)
    added = None if bias is None else _cpu.fp32(bias)
    if feedforward:
        return _gpu_linear.linear(_times(rows, factor), weight, added), nothing
    z = rows.new_empty(rows.shape[0], weight.shape[0]) if keep_z else None
    added = None if added is None else added * factor
    y = _gpu_linear.linear(rows, weight, added, None, _gpu_linear.Scale(factor, z))
    return y, nothing if z is None else z


def _times(rows: Tensor, factor: Tensor, out: Tensor | None = None) -> Tensor:
    """rows factor, in rows' dtype, in one pass."""
    if out is None:
        out = _like(rows)
    return torch.mul(rows, factor, out=out)


def _gpu_columns(
    dy: Tensor, x: Tensor | None, scale: Tensor, out: Tensor | None, need_dbias: bool
) -> tuple[Tensor | None, Tensor | None]:
    dscale = None if x is None else (dy.float() * x).sum(0)
    total = column_sums(dy) if need_dbias else None
    if out is not None:
        _times(dy, scale, out)
    return dscale, total


_NATIVE = _cpu.supports("linear", "linear_dx", "scale_columns", "scale_columns_backward")
FORWARD = (
    Impl("triton", _gpu_forward, _triton.supports, 20),
    Impl("cpu", _cpu_forward, _NATIVE, 10),
)
_on_gpu = partial(_backward, _gpu_columns, _gpu_linear.linear_dx)
_on_cpu = partial(_backward, cpu_scale_columns_backward, _lora_linear_cpu.base_dx)
BACKWARD = (
    Impl("triton", _on_gpu, _triton.supports, 20),
    Impl("cpu", _on_cpu, _NATIVE, 10),
)
