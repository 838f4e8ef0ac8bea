"""dora_linear: a frozen linear layer with a DoRA adapter.

    y = c (x W^T + scaling x A^T B^T) + bias      c = magnitude / || W + scaling B A || by rows

For the backward pass x itself (by reference), s = drop(x) A^T (fp32, [M, r]), the norms, the
dropout's seed and, where the magnitude is trained, z = y's sum before c, [M, N] in x's dtype, are
kept. z is what the magnitude's gradient is a sum of. It could be had from y, which costs nothing
where the next op keeps y too, but not where c is 0, and not once somebody changes y in place; or
from another matrix product, half as much again as the rest of the backward pass. Kept it is as
exact as y, and half of what PEFT keeps of that size or less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fusetune.ops import _check
from fusetune.ops._dora_linear import BACKWARD, FORWARD
from fusetune.ops._lora_arguments import check_arguments, fold_scaling
from fusetune.ops._registry import Impl, Op, define, plain
from fusetune.ops._weight import ARGUMENTS, SCHEMA, Weight, as_rows, flatten, unflatten
from fusetune.ops.dora_norm import dora_norm
from fusetune.ops.linear_4bit import sum_rows
from fusetune.reference import dora_linear as reference
from fusetune.reference.dropout import new_seed

Tensor = torch.Tensor


def dora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    magnitude: Tensor,
    *,
    norm: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """A linear layer with a DoRA adapter (Liu et al. 2024, arXiv:2402.09353), as PEFT computes it.

    x: [..., K]; weight: [N, K], a tensor or a `QuantizedWeight`, frozen; lora_A: [r, K];
    lora_B: [N, r]; magnitude, bias: [N]. All float16, bfloat16, float32 or float64, not necessarily
    the same. scaling: a number or a 0-d tensor. norm: [N], `dora_norm(weight, lora_A, lora_B,
    scaling)` where it is known already, which saves a pass over the weight; detached. (On a GPU
    that pass is the reference's for a 4-bit weight whose K is not a multiple of 8.)
    Returns y [..., N] in x's dtype; sums are taken in fp32 (float64 for a float64 x).

    With `training` and dropout_p > 0 everything that DoRA adds to the base layer sees drop(x), as
    in PEFT 0.21, not the adapter's branch alone:

        y = x W^T + bias + (c - 1) (drop(x) W^T) + c scaling drop(x) A^T B^T

    so that the base product is made twice. The seed is drawn from torch's generator. PEFT rounds
    the weight to the adapter's dtype before it takes the norm; here the norm is of the weight as it
    is, in fp32.

    Differentiable, once, in x, lora_A, lora_B, magnitude, bias and a tensor scaling; not through
    the norm (section 4.3 of the paper).
    Raises TypeError or ValueError, naming the argument, for shapes, dtypes, devices or values that
    do not fit, and for a weight that requires grad.
    """
    grad = torch.is_grad_enabled()
    check_arguments(x, weight, lora_A, lora_B, bias, None, dropout_p, grad)
    n = weight.shape[0]
    _check.check_float("magnitude", magnitude)
    _check.check_optional("magnitude", magnitude, n, x)
    _check.check_optional("norm", norm, n, x)
    if isinstance(scaling, Tensor):
        lora_B, _ = fold_scaling(scaling, x, lora_B, None)
        scaling = 1.0
    elif not isinstance(scaling, float | int):
        raise TypeError(f"scaling must be a number or a 0-d tensor, got {type(scaling).__name__}")
    if norm is None:
        a = lora_A.double() if x.dtype == torch.float64 else lora_A
        norm = dora_norm(weight, a, lora_B, scaling)
    else:
        norm = norm.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    seed = new_seed(x.device) if training and dropout_p > 0 else None
    arguments = (lora_A, lora_B, scaling, magnitude, norm, bias, dropout_p, seed)
    trained = (x, lora_A, lora_B, magnitude, bias)
    needed = grad and any(t is not None and t.requires_grad for t in trained)
    keep_z = needed and magnitude.requires_grad
    if torch.compiler.is_compiling() or not plain(x):
        y: Tensor = _op(x, *flatten(weight), *arguments, keep_z)[0]
        return y
    if needed:
        y = _DoraLinear.apply(x, weight, *arguments)
        return y
    return _forward(x, weight, *arguments, False)[0]


# --- implementations ------------------------------------------------------------------------------


OP = Op("dora_linear", *FORWARD, Impl("reference", reference.dora_linear, lambda case: None, 0))
OP_BACKWARD = Op(
    "dora_linear_backward",
    *BACKWARD,
    Impl("reference", reference.dora_linear_backward, lambda case: None, 0),
)


def _forward(x: Tensor, weight: Weight, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(y, s, z), z empty where it is not to be kept."""
    n, k = weight.shape
    run = OP.run(x.device.type, x.dtype, _dense_dtype(weight))
    y, s, z = run(as_rows(x, k), weight, *arguments)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n), s, z


def _backward(dy: Tensor, x: Tensor, weight: Weight, *arguments: Any) -> list[Tensor | None]:
    """[dx, dA, dB, dmagnitude]; None for those that are not needed."""
    n, k = weight.shape
    run = OP_BACKWARD.run(dy.device.type, dy.dtype, _dense_dtype(weight))
    dx, *others = run(as_rows(dy, n), as_rows(x, k), weight, *arguments)
    return [dx if dx is None or dy.dim() == 2 else dx.view(*dy.shape[:-1], k), *others]


def _dense_dtype(weight: Weight) -> torch.dtype | None:
    return weight.dtype if isinstance(weight, Tensor) else None


# --- autograd, eager: without the dispatcher ------------------------------------------------------


class _DoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        magnitude: Tensor,
        norm: Tensor,
        bias: Tensor | None,
        dropout_p: float,
        seed: Tensor | None,
    ) -> Tensor:
        need = ctx.needs_input_grad
        y, s, z = _forward(
            x, weight, lora_A, lora_B, scaling, magnitude, norm, bias, dropout_p, seed, need[5]
        )
        dense = weight if isinstance(weight, Tensor) else None
        ctx.save_for_backward(x, lora_A, lora_B, magnitude, norm, s, z, seed, dense)
        ctx.quantized = weight if dense is None else None
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        ctx.bias_dtype = bias.dtype if bias is not None and need[7] else None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, magnitude, norm, s, z, seed, dense = ctx.saved_tensors
        weight = ctx.quantized if dense is None else dense
        need = [ctx.needs_input_grad[i] for i in (0, 2, 3, 5)]
        dx = dA = dB = dmagnitude = None
        if any(need):
            saved = (lora_A, lora_B, ctx.scaling, magnitude, norm, s, z, ctx.dropout_p, seed)
            dx, dA, dB, dmagnitude = _backward(dy, x, weight, *saved, *need)
        dbias = None if ctx.bias_dtype is None else sum_rows(dy, ctx.bias_dtype)
        return dx, None, dA, dB, None, dmagnitude, None, dbias, None, None


# --- torch.library: what torch.compile, export and fake tensors see -------------------------------

_A = 1 + ARGUMENTS  # position of lora_A among the op's arguments
_NEED = (0, _A, _A + 1, _A + 3)  # x, lora_A, lora_B, magnitude
_BIAS = _A + 5


def _run(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, unflatten(args[:ARGUMENTS]), *args[ARGUMENTS:])


def _run_backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    grads = _backward(dy, x, unflatten(args[:ARGUMENTS]), *args[ARGUMENTS:])
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


def _fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows, n = x.shape[:-1].numel(), args[ARGUMENTS - 2]
    s = x.new_empty(rows, args[ARGUMENTS].shape[0], dtype=acc)
    return x.new_empty(*x.shape[:-1], n), s, x.new_empty(rows, n) if args[-1] else x.new_empty(0)


def _fake_backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    lora_A, lora_B, _, magnitude = args[ARGUMENTS : ARGUMENTS + 4]
    return tuple(
        like.new_empty(like.shape) if need else dy.new_empty(0)
        for like, need in zip((x, lora_A, lora_B, magnitude), args[-4:], strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    lora_A, lora_B, scaling, magnitude, norm, bias, dropout_p, seed, _ = inputs[_A:]
    _, s, z = output
    ctx.mark_non_differentiable(s, z)
    ctx.save_for_backward(inputs[0], *inputs[1:6], lora_A, lora_B, magnitude, norm, s, z, seed)
    ctx.plain = inputs[6:_A]
    ctx.scaling, ctx.dropout_p = scaling, dropout_p
    ctx.bias_dtype = bias.dtype if bias is not None and ctx.needs_input_grad[_BIAS] else None


def _library_backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, *weight, lora_A, lora_B, magnitude, norm, s, z, seed = ctx.saved_tensors
    need = [ctx.needs_input_grad[i] for i in _NEED]
    grads: list[Tensor | None] = [None] * (_A + 9)
    if any(need):
        saved = (lora_A, lora_B, ctx.scaling, magnitude, norm, s, z, ctx.dropout_p, seed)
        results = _op_backward(dy, x, *weight, *ctx.plain, *saved, *need)
        for position, result, needed in zip(_NEED, results, need, strict=True):
            grads[position] = result if needed else None
    if ctx.bias_dtype is not None:
        grads[_BIAS] = sum_rows(dy, ctx.bias_dtype)
    return tuple(grads)


_op = define(
    f"dora_linear(Tensor x, {SCHEMA}, Tensor lora_A, Tensor lora_B, float scaling, "
    "Tensor magnitude, Tensor norm, Tensor? bias, float dropout_p, Tensor? seed, bool keep_z) "
    "-> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _library_backward,
    _setup_context,
)
_op_backward = define(
    f"dora_linear_backward(Tensor dy, Tensor x, {SCHEMA}, Tensor lora_A, Tensor lora_B, "
    "float scaling, Tensor magnitude, Tensor norm, Tensor s, Tensor z, float dropout_p, "
    "Tensor? seed, bool need_dx, bool need_dA, bool need_dB, bool need_dmagnitude) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
