"""linear: y = x W^T + bias with a frozen dense W, differentiable in x and bias.

What prompts, adapters and every other method spend most of their time in: the base model's own
layers. On the CPU our matmul is ahead of torch's for most shapes; GPUs keep torch's.
"""

from __future__ import annotations

from typing import Any

import torch

from fusetune.ops import _check, _cpu
from fusetune.ops._lora_linear_cpu import base_dx, torch_multiplies, with_contiguous_rows
from fusetune.ops._registry import Impl, Op, define, plain
from fusetune.ops._weight import as_rows
from fusetune.ops.linear_4bit import sum_rows
from fusetune.reference import linear as reference

Tensor = torch.Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the transpose of weight [N, K], plus bias [N]: y [..., N] in x's dtype.

    All float16, bfloat16, float32 or float64, any strides; sums are taken in fp32 (float64 for
    float64). weight is frozen. Differentiable in x and bias, any number of times; neither x nor y
    is kept for the backward pass.

    Raises TypeError or ValueError, naming the argument, for shapes, dtypes or devices that do not
    fit, and for a weight that requires grad.
    """
    grad = torch.is_grad_enabled()
    _check_arguments(x, weight, bias, grad)
    if torch.compiler.is_compiling() or not plain(x):
        y: Tensor = _op(x, weight, bias)
        return y
    if grad and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y = _Linear.apply(x, weight, bias)
        return y
    return _forward(x, weight, bias)


def _check_arguments(x: Tensor, weight: Tensor, bias: Tensor | None, grad: bool) -> None:
    _check.check_float("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must be a matrix [N, K], got shape {list(weight.shape)}")
    if grad and weight.requires_grad:
        raise ValueError("weight requires grad, but it is treated as frozen: detach it")
    _check.check_x(x, weight.shape[1])
    _check.check_device("weight", weight, x)
    _check.check_optional("bias", bias, weight.shape[0], x)


# --- implementations ------------------------------------------------------------------------------


def _cpu_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch_multiplies(rows, weight):
        return torch.nn.functional.linear(rows, weight, None if bias is None else bias.to(rows))
    bias32 = None if bias is None else _cpu.fp32(bias)
    return _cpu.linear(rows, with_contiguous_rows(weight), weight.shape[0], bias32, None, False)


OP = Op(
    "linear",
    Impl("cpu", _cpu_linear, _cpu.supports("linear"), 10),
    Impl("reference", reference.linear, lambda case: None, 0),
)
OP_DX = Op(
    "linear_dx",
    Impl("cpu", base_dx, _cpu.supports("linear_dx"), 10),
    Impl("reference", reference.linear_dx, lambda case: None, 0),
)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    n, k = weight.shape
    run = OP.run(x.device.type, x.dtype, weight.dtype)
    y: Tensor = run(as_rows(x, k), weight, bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n)


def _dx(dy: Tensor, weight: Tensor) -> Tensor:
    n, k = weight.shape
    run = OP_DX.run(dy.device.type, dy.dtype, weight.dtype)
    dx: Tensor = run(as_rows(dy, n), weight)
    return dx if dy.dim() == 2 else dx.view(*dy.shape[:-1], k)


# --- autograd, eager: without the dispatcher ------------------------------------------------------


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            again = torch.is_grad_enabled()  # this derivative is to be differentiated in turn
            dx = _op_dx(dy, weight) if again else _dx(dy, weight)
        dbias = sum_rows(dy, ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, None, dbias


# --- torch.library: what torch.compile, export and fake tensors see -------------------------------


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_dx(dy: Tensor, weight: Tensor) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], weight.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, bias = inputs
    ctx.save_for_backward(weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    dx = _op_dx(dy, weight) if ctx.needs_input_grad[0] else None
    return dx, None, sum_rows(dy, ctx.bias_dtype) if ctx.needs_input_grad[2] else None


def _setup_context_dx(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward_dx(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    return _op(ddx, *ctx.saved_tensors, None), None


_op = define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _forward,
    _fake,
    _backward,
    _setup_context,
)
_op_dx = define(
    "linear_dx(Tensor dy, Tensor weight) -> Tensor", _dx, _fake_dx, _backward_dx, _setup_context_dx
)
