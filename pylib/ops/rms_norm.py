"""rms_norm: y = weight x / sqrt(mean(x^2) + eps), in one pass each way.

PyTorch takes half a dozen operators each way and keeps three tensors of x's size for the backward
pass. Here x is kept, by reference, and one number a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fusetune.ops import _check, _cpu, _triton
from fusetune.ops._registry import Impl, Op, define, plain
from fusetune.ops._weight import as_rows
from fusetune.reference import rms_norm as reference

Tensor = torch.Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467, equation 4).

    x: [..., N], weight: [N], both float16, bfloat16, float32 or float64, any strides. Returns y
    [..., N] in x's dtype; computed in fp32 (float64 for float64) and rounded once. Differentiable,
    once, in x and weight.

    Raises TypeError or ValueError, naming the argument, for shapes, dtypes or devices that do not
    fit.
    """
    _check.check_float("x", x)
    if x.dim() == 0:
        raise ValueError("x must have shape [..., N], got []")
    _check.check_optional("weight", weight, x.shape[-1], x)
    if torch.compiler.is_compiling() or not plain(x):
        y: Tensor = _op(x, weight, eps)[0]
        return y
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        y = _RmsNorm.apply(x, weight, eps)
        return y
    return _forward(x, weight, eps)[0]


# --- implementations ------------------------------------------------------------------------------


def _cpu_forward(rows: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    m, n = rows.shape
    w = _cpu.fp32(weight)
    y, rstd = _cpu.empty(m, n, dtype=rows.dtype), _cpu.empty(m, dtype=torch.float32)
    arguments = w.data_ptr(), eps, _cpu.matrix(y), rstd.data_ptr()
    _cpu.kernels().rms_norm(_cpu.matrix(rows), m, n, *arguments)
    return y, rstd


def _cpu_dx(dy: Tensor, rows: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    m, n = rows.shape
    w = _cpu.fp32(weight)
    dx = _cpu.empty(m, n, dtype=rows.dtype)
    arguments = w.data_ptr(), rstd.data_ptr(), _cpu.matrix(dx)
    _cpu.kernels().rms_norm_dx(_cpu.matrix(dy), _cpu.matrix(rows), m, n, *arguments)
    return dx


def _triton_forward(rows: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from fusetune._triton.rms_norm import launch_rms_norm

    y = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    rstd = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    with _triton.on(rows.device):
        launch_rms_norm(rows, _triton.adapter(weight), eps, y, rstd)
    return y, rstd


def _triton_dx(dy: Tensor, rows: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    from fusetune._triton.rms_norm import launch_rms_norm_dx

    dx = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    with _triton.on(rows.device):
        launch_rms_norm_dx(dy, rows, _triton.adapter(weight), rstd, dx)
    return dx


OP = Op(
    "rms_norm",
    Impl("triton", _triton_forward, _triton.supports, 20),
    Impl("cpu", _cpu_forward, _cpu.supports("rms_norm"), 10),
    Impl("reference", reference.rms_norm, lambda case: None, 0),
)
OP_DX = Op(
    "rms_norm_dx",
    Impl("triton", _triton_dx, _triton.supports, 20),
    Impl("cpu", _cpu_dx, _cpu.supports("rms_norm_dx"), 10),
    Impl("reference", reference.rms_norm_dx, lambda case: None, 0),
)


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    run = OP.run(x.device.type, x.dtype, None)
    y, rstd = run(as_rows(x, x.shape[-1]), weight, eps)
    return y.view(x.shape), rstd


def _dx(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    n = x.shape[-1]
    run = OP_DX.run(x.device.type, x.dtype, None)
    dx: Tensor = run(as_rows(dy, n), as_rows(x, n), weight, rstd)
    return dx.view(x.shape)


def _dweight(dy: Tensor, x: Tensor, rstd: Tensor, dtype: torch.dtype) -> Tensor:
    n = x.shape[-1]
    upper, rows = (t.reshape(rstd.numel(), n).to(rstd.dtype) for t in (dy, x))
    return (upper * rows * rstd[:, None]).sum(0).to(dtype)


# --- autograd, eager ------------------------------------------------------------------------------


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _forward(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dx = _dx(dy, x, weight, rstd) if ctx.needs_input_grad[0] else None
        dweight = _dweight(dy, x, rstd, weight.dtype) if ctx.needs_input_grad[1] else None
        return dx, dweight, None


# --- torch.library: what torch.compile, export and fake tensors see -------------------------------


def _fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), dtype=acc)


def _fake_dx(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _library_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    dx = _op_dx(dy, x, weight, rstd) if ctx.needs_input_grad[0] else None
    dweight = _dweight(dy, x, rstd, weight.dtype) if ctx.needs_input_grad[1] else None
    return dx, dweight, None


_op = define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _library_backward,
    _setup_context,
)
_op_dx = define(
    "rms_norm_dx(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> Tensor", _dx, _fake_dx
)
