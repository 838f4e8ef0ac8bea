"""linear_4bit: y = x W^T + bias with a frozen 4-bit W, differentiable in x and bias."""

from __future__ import annotations

from typing import Any

import torch

from fusetune.ops import _check, _cpu, _cuda, _gpu_linear, _triton
from fusetune.ops._registry import Impl, Op, decode_int16, define, plain
from fusetune.ops._scale_columns import column_sums
from fusetune.ops._weight import ARGUMENTS, SCHEMA, as_rows, flatten, unflatten
from fusetune.quantized_weight import QuantizedWeight
from fusetune.reference import linear_4bit as reference


def linear_4bit(
    x: torch.Tensor, w: QuantizedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [..., K] times the transpose of w [N, K], plus bias [N]: y [..., N] in x's dtype.

    x: float16, bfloat16, float32 or float64, any strides; sums are taken in fp32 (float64 for
    float64). The weight is decoded piece by piece and never held whole. Differentiable in x and
    bias, any number of times; neither x nor y is kept for the backward pass.

    Raises TypeError or ValueError, naming the argument, for shapes, dtypes or devices that do not
    fit.
    """
    if not (
        isinstance(x, torch.Tensor)
        and isinstance(w, QuantizedWeight)
        and x.shape[-1:] == w.shape[1:]
        and x.dtype in _check.FLOATS
        and x.device == w.packed.device
        and bias is None
    ):
        _check_arguments(x, w, bias)
    grad = torch.is_grad_enabled()
    int16 = decode_int16() and not grad
    if torch.compiler.is_compiling() or not plain(x):
        y: torch.Tensor = _op(x, *flatten(w), bias, int16)
        return y
    if grad and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y = _Linear4bit.apply(x, w, bias)
        return y
    return _forward(x, w, bias, int16)


def _check_arguments(x: torch.Tensor, w: QuantizedWeight, bias: torch.Tensor | None) -> None:
    _check.check_float("x", x)
    _check.check_quantized(w, x)
    _check.check_x(x, w.shape[1])
    _check.check_optional("bias", bias, w.shape[0], x)


# --- implementations ---- -------------------------------------------------------------------------


def _cpu_linear(
    rows: torch.Tensor, w: QuantizedWeight, bias: torch.Tensor | None, int16: bool
) -> torch.Tensor:
    bias32 = None if bias is None else _cpu.fp32(bias)
    return _cpu.linear(rows, w, w.shape[0], bias32, None, int16)


def _cpu_dx(rows: torch.Tensor, w: QuantizedWeight) -> torch.Tensor:
    m, n = rows.shape
    dx = _cpu.empty(m, w.shape[1], dtype=rows.dtype)
    _cpu.kernels().linear_dx(
        _cpu.matrix(rows), m, n, w.shape[1], _cpu.weight_4bit(w), None, None, None, _cpu.matrix(dx)
    )
    return dx


def _gpu_forward(
    rows: torch.Tensor, w: QuantizedWeight, bias: torch.Tensor | None, int16: bool
) -> torch.Tensor:
    bias32 = None if bias is None else _cpu.fp32(bias)
    return _gpu_linear.linear(rows, w, bias32)


def _reference_linear(
    rows: torch.Tensor, w: QuantizedWeight, bias: torch.Tensor | None, int16: bool
) -> torch.Tensor:
    return reference.linear_4bit(rows, w, bias)


OP = Op(
    "linear_4bit",
    Impl("cuda", _gpu_forward, _cuda.supports, 30),
    Impl("triton", _gpu_forward, _triton.supports, 20),
    Impl("cpu", _cpu_linear, _cpu.supports("linear"), 10),
    Impl("reference", _reference_linear, lambda case: None, 0),
)
OP_DX = Op(
    "linear_4bit_dx",
    Impl("cuda", _gpu_linear.linear_dx, _cuda.supports, 30),
    Impl("triton", _gpu_linear.linear_dx, _triton.supports, 20),
    Impl("cpu", _cpu_dx, _cpu.supports("linear_dx"), 10),
    Impl("reference", reference.linear_4bit_dx, lambda case: None, 0),
)


def _forward(
    x: torch.Tensor, w: QuantizedWeight, bias: torch.Tensor | None, int16: bool
) -> torch.Tensor:
    n, k = w.shape
    run = OP.run(x.device.type, x.dtype, None)
    y: torch.Tensor = run(as_rows(x, k), w, bias, int16)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n)


def _dx(dy: torch.Tensor, w: QuantizedWeight) -> torch.Tensor:
    n, k = w.shape
    run = OP_DX.run(dy.device.type, dy.dtype, None)
    dx: torch.Tensor = run(as_rows(dy, n), w)
    return dx if dy.dim() == 2 else dx.view(*dy.shape[:-1], k)


def sum_rows(dy: torch.Tensor, like: torch.dtype) -> torch.Tensor:
    """The gradient of a bias: dy [..., N] summed to [N] in at least fp32, then in dtype `like`."""
    return column_sums(as_rows(dy, dy.shape[-1])).to(like)


# --- autograd, eager: without the dispatcher, which costs more than a small matmul ----------------


class _Linear4bit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, w: QuantizedWeight, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.w = w
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _forward(x, w, bias, False)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx = None
        if ctx.needs_input_grad[0]:
            again = torch.is_grad_enabled()  # this derivative is to be differentiated in turn
            dx = _op_dx(dy, *flatten(ctx.w)) if again else _dx(dy, ctx.w)
        dbias = sum_rows(dy, ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, None, dbias


# --- torch.library: what torch.compile, export and fake tensors see -------------------------------


def _unflatten(args: tuple[Any, ...]) -> QuantizedWeight:
    w = unflatten(args)
    assert isinstance(w, QuantizedWeight)
    return w


def _run(x: torch.Tensor, *args: Any) -> torch.Tensor:
    return _forward(x, _unflatten(args[:ARGUMENTS]), *args[ARGUMENTS:])


def _run_dx(dy: torch.Tensor, *args: Any) -> torch.Tensor:
    return _dx(dy, _unflatten(args))


def _fake(x: torch.Tensor, *args: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], args[ARGUMENTS - 2])


def _fake_dx(dy: torch.Tensor, *args: Any) -> torch.Tensor:
    return dy.new_empty(*dy.shape[:-1], args[ARGUMENTS - 1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    weight = inputs[1 : 1 + ARGUMENTS]
    bias = inputs[1 + ARGUMENTS]
    ctx.save_for_backward(*weight[:5])
    ctx.plain = weight[5:]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _setup_context_dx(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[1:6])
    ctx.plain = inputs[6:]


def _backward_dx(ctx: Any, ddx: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    ddy = _op(ddx, *ctx.saved_tensors, *ctx.plain, None, False)
    return ddy, *([None] * ARGUMENTS)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grads: list[torch.Tensor | None] = [None] * (ARGUMENTS + 3)
    if ctx.needs_input_grad[0]:
        grads[0] = _op_dx(dy, *ctx.saved_tensors, *ctx.plain)
    if ctx.needs_input_grad[1 + ARGUMENTS]:
        grads[1 + ARGUMENTS] = sum_rows(dy, ctx.bias_dtype)
    return tuple(grads)


_op = define(
    f"linear_4bit(Tensor x, {SCHEMA}, Tensor? bias, bool int16) -> Tensor",
    _run,
    _fake,
    _backward,
    _setup_context,
)
_op_dx = define(
    f"linear_4bit_dx(Tensor dy, {SCHEMA}) -> Tensor",
    _run_dx,
    _fake_dx,
    _backward_dx,
    _setup_context_dx,
)
