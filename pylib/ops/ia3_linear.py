"""ia3_linear: a frozen linear layer with IA3's vector on its output or on its input.

    keys, values   y = scale (x W^T + bias)        feed-forward   y = (scale x) W^T + bias

For the backward pass feed-forward layers keep x itself (by reference), the others z = x W^T, [M, N]
in x's dtype, and only where the vector is trained. Neither keeps a scaled copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fusetune.ops import _check
from fusetune.ops._ia3_linear import BACKWARD, FORWARD
from fusetune.ops._registry import Impl, Op, define, plain
from fusetune.ops._weight import ARGUMENTS, SCHEMA, Weight, as_rows, flatten, unflatten
from fusetune.reference import ia3_linear as reference

Tensor = torch.Tensor
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def ia3_linear(
    x: Tensor,
    weight: Weight,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    feedforward: bool = False,
) -> Tensor:
    """A linear layer with an IA3 vector (Liu et al. 2022, arXiv:2205.05638, section 3.3).

    x: [..., K]; weight: [N, K], a tensor or a `QuantizedWeight`, frozen; bias: [N]; scale: [N], by
    which the output is multiplied, bias included, or with `feedforward` [K], for the input. All
    float16, bfloat16, float32 or float64, not necessarily the same.
    Returns y [..., N] in x's dtype; sums are taken in fp32 (float64 for a float64 x).

    Differentiable, once, in x, scale and bias. Raises TypeError or ValueError, naming the argument,
    for shapes, dtypes or devices that do not fit, and for a weight that requires grad.
    """
    grad = torch.is_grad_enabled()
    _check_arguments(x, weight, scale, bias, feedforward, grad)
    needed = grad and any(t is not None and t.requires_grad for t in (x, scale, bias))
    if torch.compiler.is_compiling() or not plain(x):
        keep_z = needed and scale.requires_grad and not feedforward
        y: Tensor = _op(x, *flatten(weight), scale, bias, feedforward, keep_z)[0]
        return y
    if needed:
        y = _Ia3Linear.apply(x, weight, scale, bias, feedforward)
        return y
    return _forward(x, weight, scale, bias, feedforward, False)[0]


def _check_arguments(
    x: Tensor, weight: Weight, scale: Tensor, bias: Tensor | None, feedforward: bool, grad: bool
) -> None:
    n, k = _check.check_layer(x, weight, grad)
    _check.check_float("scale", scale)
    _check.check_optional("scale", scale, k if feedforward else n, x)
    _check.check_optional("bias", bias, n, x)


# --- implementations ------------------------------------------------------------------------------


OP = Op("ia3_linear", *FORWARD, Impl("reference", reference.ia3_linear, lambda case: None, 0))
OP_BACKWARD = Op(
    "ia3_linear_backward",
    *BACKWARD,
    Impl("reference", reference.ia3_linear_backward, lambda case: None, 0),
)


def _forward(x: Tensor, weight: Weight, *arguments: Any) -> tuple[Tensor, Tensor]:
    """(y, z), z [M, N], or empty where it is not to be kept."""
    n, k = weight.shape
    run = OP.run(x.device.type, x.dtype, _dense_dtype(weight))
    y, z = run(as_rows(x, k), weight, *arguments)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n), z


def _backward(dy: Tensor, x: Tensor | None, weight: Weight, *arguments: Any) -> Gradients:
    """(dx, dscale, dbias); None for those that are not needed. x: None but for feed-forward."""
    n, k = weight.shape
    run = OP_BACKWARD.run(dy.device.type, dy.dtype, _dense_dtype(weight))
    rows = None if x is None else as_rows(x, k)
    dx, dscale, dbias = run(as_rows(dy, n), rows, weight, *arguments)
    return dx if dx is None or dy.dim() == 2 else dx.view(*dy.shape[:-1], k), dscale, dbias


def _dense_dtype(weight: Weight) -> torch.dtype | None:
    return weight.dtype if isinstance(weight, Tensor) else None


# --- autograd, eager ------------------------------------------------------------------------------


class _Ia3Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        scale: Tensor,
        bias: Tensor | None,
        feedforward: bool,
    ) -> Tensor:
        trained = ctx.needs_input_grad[2]
        y, z = _forward(x, weight, scale, bias, feedforward, trained and not feedforward)
        dense = weight if isinstance(weight, Tensor) else None
        ctx.save_for_backward(x if feedforward and trained else None, scale, bias, z, dense)
        ctx.quantized = weight if dense is None else None
        ctx.feedforward = feedforward
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, bias, z, dense = ctx.saved_tensors
        weight = ctx.quantized if dense is None else dense
        need = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        dx, dscale, dbias = _backward(dy, x, weight, scale, bias, z, ctx.feedforward, *need)
        return dx, None, dscale, dbias, None


# --- torch.library: what torch.compile, export and fake tensors see -------------------------------

_SCALE = 1 + ARGUMENTS  # position among the op's arguments
_NEED = (0, _SCALE, _SCALE + 1)  # x, scale, bias


def _run(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _forward(x, unflatten(args[:ARGUMENTS]), *args[ARGUMENTS:])


def _run_backward(dy: Tensor, x: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    grads = _backward(dy, x, unflatten(args[:ARGUMENTS]), *args[ARGUMENTS:])
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


def _fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    rows, n, keep_z = x.shape[:-1].numel(), args[ARGUMENTS - 2], args[-1]
    y = x.new_empty(*x.shape[:-1], n)
    return y, x.new_empty(rows, n) if keep_z else x.new_empty(0)


def _fake_backward(dy: Tensor, x: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    k, (scale, bias), need = args[ARGUMENTS - 1], args[ARGUMENTS : ARGUMENTS + 2], args[-3:]
    nothing = dy.new_empty(0)
    dx = dy.new_empty(*dy.shape[:-1], k) if need[0] else nothing
    dscale = scale.new_empty(scale.shape) if need[1] else nothing
    return dx, dscale, bias.new_empty(bias.shape) if need[2] else dy.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    scale, bias, feedforward, _ = inputs[_SCALE:]
    ctx.mark_non_differentiable(output[1])
    x = inputs[0] if feedforward and ctx.needs_input_grad[_SCALE] else None
    ctx.save_for_backward(x, *inputs[1:6], scale, bias, output[1])
    ctx.plain = inputs[6:_SCALE]
    ctx.feedforward = feedforward


def _library_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, *weight, scale, bias, z = ctx.saved_tensors
    need = [ctx.needs_input_grad[i] for i in _NEED]
    grads: list[Tensor | None] = [None] * (_SCALE + 4)
    results = _op_backward(dy, x, *weight, *ctx.plain, scale, bias, z, ctx.feedforward, *need)
    for position, result, needed in zip(_NEED, results, need, strict=True):
        grads[position] = result if needed else None
    return tuple(grads)


_op = define(
    f"ia3_linear(Tensor x, {SCHEMA}, Tensor scale, Tensor? bias, bool feedforward, bool keep_z) "
    "-> (Tensor, Tensor)",
    _run,
    _fake,
    _library_backward,
    _setup_context,
)
_op_backward = define(
    f"ia3_linear_backward(Tensor dy, Tensor? x, {SCHEMA}, Tensor scale, Tensor? bias, Tensor z, "
    "bool feedforward, bool need_dx, bool need_dscale, bool need_dbias) "
    "-> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
