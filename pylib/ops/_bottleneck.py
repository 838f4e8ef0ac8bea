"""The op bottleneck: y = residual + drop(f(x W_d^T + b_d) W_u^T + b_u), with autograd.

For the backward pass x itself (by reference), z = x W_d^T + b_d ([M, d]) and the dropout's seed are
kept, and nothing else of the size of an activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fusetune.ops._bottleneck_cpu import CPU_BACKWARD, CPU_FORWARD
from fusetune.ops._bottleneck_gpu import GPU_BACKWARD, GPU_FORWARD
from fusetune.ops._registry import Impl, Op, define, plain
from fusetune.ops._weight import as_rows
from fusetune.reference import bottleneck as reference

Tensor = torch.Tensor


def branch(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    rows: list[int] | None,
    activation: str,
    residual: Tensor | None,
    same: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """y [..., H] in x's dtype, of `ops.bottleneck`'s arguments; same: x itself is the residual.

    seed: int64 [1] where the branch is dropped out. Differentiable, once, in x, the parameters and
    the residual. Arguments are trusted.
    """
    parameters = (down_weight, down_bias, up_weight, up_bias)
    settings: tuple[Any, ...] = (rows, activation, residual, same, dropout_p, seed)
    if torch.compiler.is_compiling() or not plain(x):
        y: Tensor = _op(x, *parameters, *settings)[0]
        return y
    trained = (x, *parameters, residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained):
        y = _Bottleneck.apply(x, *parameters, *settings)
        return y
    return _forward(x, *parameters, *settings)[0]


# --- implementations ------------------------------------------------------------------------------
# They take x, dy and a residual as rows [M, H], and weights and biases with the leading G.


OP = Op(
    "bottleneck",
    GPU_FORWARD,
    CPU_FORWARD,
    Impl("reference", reference.bottleneck, lambda case: None, 0),
)
OP_BACKWARD = Op(
    "bottleneck_backward",
    GPU_BACKWARD,
    CPU_BACKWARD,
    Impl("reference", reference.bottleneck_backward, lambda case: None, 0),
)


def _weight_dtype(down_weight: Tensor, up_weight: Tensor) -> torch.dtype:
    """What the choice of an implementation depends on: float64, which has no kernels, wins."""
    return up_weight.dtype if up_weight.dtype == torch.float64 else down_weight.dtype


def _forward(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    rows: Sequence[int] | None,
    activation: str,
    residual: Tensor | None,
    same: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    h = x.shape[-1]
    flat = as_rows(x, h)
    if residual is not None:
        residual = as_rows(residual, h)
    parameters = [down_weight, down_bias, up_weight, up_bias]
    if rows is None:
        parameters = [None if p is None else p.unsqueeze(0) for p in parameters]
        rows = [flat.shape[0]]
    run = OP.run(x.device.type, x.dtype, _weight_dtype(down_weight, up_weight))
    y, z = run(flat, *parameters, rows, activation, residual, same, dropout_p, seed)
    return y if x.dim() == 2 else y.view(x.shape), z


def _backward(
    dy: Tensor,
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    z: Tensor,
    rows: Sequence[int] | None,
    *arguments: Any,
) -> tuple[Tensor | None, ...]:
    """(dx, d_down_weight, d_down_bias, d_up_weight, d_up_bias); see the reference."""
    h = x.shape[-1]
    run = OP_BACKWARD.run(dy.device.type, dy.dtype, _weight_dtype(down_weight, up_weight))
    flat = as_rows(x, h)
    if rows is not None:
        dx, *grads = run(as_rows(dy, h), flat, down_weight, up_weight, z, rows, *arguments)
    else:
        weights = (down_weight.unsqueeze(0), up_weight.unsqueeze(0))
        dx, *grads = run(as_rows(dy, h), flat, *weights, z, [flat.shape[0]], *arguments)
        grads = [None if grad is None else grad.squeeze(0) for grad in grads]
    return dx if dx is None or x.dim() == 2 else dx.view(x.shape), *grads


# --- autograd, eager: without the dispatcher ------------------------------------------------------


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, z = _forward(*inputs)
        _save(ctx, inputs, z)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dy, _backward)


def _save(ctx: Any, inputs: tuple[Any, ...], z: Tensor) -> None:
    x, down_weight, down_bias, up_weight, up_bias = inputs[:5]
    ctx.rows, ctx.activation, residual, ctx.same, ctx.dropout_p, seed = inputs[5:]
    ctx.save_for_backward(x, down_weight, up_weight, z, seed)
    ctx.dtypes = [None if t is None else t.dtype for t in (down_bias, up_bias, residual)]


def _gradients(ctx: Any, dy: Tensor, run: Any) -> tuple[Tensor | None, ...]:
    """Those of `_forward`'s eleven arguments."""
    x, down_weight, up_weight, z, seed = ctx.saved_tensors
    down_bias, up_bias, residual = ctx.dtypes
    need = list(ctx.needs_input_grad[:5])
    grads: list[Tensor | None] = [None] * 11
    if any(need):
        settings = (ctx.rows, ctx.activation, ctx.same, ctx.dropout_p, seed, need)
        results = run(dy, x, down_weight, up_weight, z, *settings)
        grads[:5] = [g if needed else None for g, needed in zip(results, need, strict=True)]
    for position, dtype in ((2, down_bias), (4, up_bias)):
        grad = grads[position]
        grads[position] = None if grad is None else grad.to(dtype)
    if ctx.needs_input_grad[7]:
        grads[7] = dy.to(residual)
    return tuple(grads)


# --- torch.library: what torch.compile, export and fake tensors see -------------------------------


def _run_backward(*arguments: Any) -> tuple[Tensor, ...]:
    grads = _backward(*arguments)
    return tuple(arguments[0].new_empty(0) if grad is None else grad for grad in grads)


def _fake(x: Tensor, down_weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), down_weight.shape[-2])


def _fake_backward(
    dy: Tensor, x: Tensor, down_weight: Tensor, up_weight: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    shapes = (
        (x.shape, x.dtype),
        (down_weight.shape, down_weight.dtype),
        (down_weight.shape[:-1], acc),
        (up_weight.shape, up_weight.dtype),
        (up_weight.shape[:-1], acc),
    )
    return tuple(
        dy.new_empty(shape, dtype=dtype) if needed else dy.new_empty(0)
        for (shape, dtype), needed in zip(shapes, arguments[-1], strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    _save(ctx, inputs, output[1])


def _library_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, dy, _op_backward)


_SETTINGS = "float dropout_p, Tensor? seed"
_op = define(
    "bottleneck(Tensor x, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias,"
    f" int[]? rows, str activation, Tensor? residual, bool same, {_SETTINGS}) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _library_backward,
    _setup_context,
)
_op_backward = define(
    "bottleneck_backward(Tensor dy, Tensor x, Tensor down_weight, Tensor up_weight, Tensor z, "
    f"int[]? rows, str activation, bool same, {_SETTINGS}, bool[] need) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
