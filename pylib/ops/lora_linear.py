"""lora_linear: y = x W^T + bias + scaling (drop(x) A^T B^T + lora_bias) with a frozen W.

For the backward pass x itself (by reference), s = drop(x) A^T (fp32, [M, r]) and the dropout's seed
are kept, and nothing else of the size of an activation: the mask is drawn again from the seed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fusetune.ops._lora_arguments import any_requires_grad, check_arguments, fold_scaling
from fusetune.ops._lora_linear_cpu import CPU_BACKWARD, CPU_FORWARD
from fusetune.ops._lora_linear_gpu import GPU_BACKWARD, GPU_FORWARD
from fusetune.ops._registry import Impl, Op, decode_int16, define, plain
from fusetune.ops._weight import ARGUMENTS, SCHEMA, Weight, as_rows, flatten, unflatten
from fusetune.ops.linear_4bit import sum_rows
from fusetune.reference import lora_linear as reference
from fusetune.reference.dropout import new_seed

Tensor = torch.Tensor


def lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    *,
    bias: Tensor | None = None,
    lora_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """A linear layer with a LoRA adapter (Hu et al. 2021, arXiv:2106.09685), as PEFT computes it.

    x: [..., K]; weight: [N, K], a tensor or a `QuantizedWeight`, frozen; lora_A: [r, K];
    lora_B: [N, r]; bias, lora_bias: [N]. All float16, bfloat16, float32 or float64, not
    necessarily the same. scaling: a number or a 0-d tensor. With `training` and dropout_p > 0, x
    is dropped out on its way to lora_A, with a seed from torch's generator.
    Returns y [..., N] in x's dtype; sums are taken in fp32 (float64 for a float64 x).

    Differentiable, once, in x, lora_A, lora_B, bias, lora_bias and a tensor scaling.
    Raises TypeError or ValueError, naming the argument, for shapes, dtypes, devices or values that
    do not fit, and for a weight that requires grad.
    """
    grad = torch.is_grad_enabled()
    check_arguments(x, weight, lora_A, lora_B, bias, lora_bias, dropout_p, grad)
    if isinstance(scaling, Tensor):
        lora_B, lora_bias = fold_scaling(scaling, x, lora_B, lora_bias)
        scaling = 1.0
    elif not isinstance(scaling, float | int):
        raise TypeError(f"scaling must be a number or a 0-d tensor, got {type(scaling).__name__}")
    seed = new_seed(x.device) if training and dropout_p > 0 else None
    int16 = decode_int16() and not grad
    if torch.compiler.is_compiling() or not plain(x):
        y: Tensor = _op(
            x,
            *flatten(weight),
            lora_A,
            lora_B,
            scaling,
            bias,
            lora_bias,
            dropout_p,
            seed,
            int16,
        )[0]
        return y
    arguments = (x, weight, lora_A, lora_B, scaling, bias, lora_bias, dropout_p, seed)
    if grad and any_requires_grad(x, lora_A, lora_B, bias, lora_bias):
        y = _LoraLinear.apply(*arguments)
        return y
    return _forward(*arguments, int16)[0]


# --- implementations ---- -------------------------------------------------------------------------


def _reference_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    return reference.lora_linear(*arguments[:-1])  # its last one, int16, is an approximation


OP = Op(
    "lora_linear",
    *GPU_FORWARD,
    CPU_FORWARD,
    Impl("reference", _reference_forward, lambda case: None, 0),
)
OP_BACKWARD = Op(
    "lora_linear_backward",
    *GPU_BACKWARD,
    CPU_BACKWARD,
    Impl("reference", reference.lora_linear_backward, lambda case: None, 0),
)


def _forward(x: Tensor, weight: Weight, *arguments: Any) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    run = OP.run(x.device.type, x.dtype, _dense_dtype(weight))
    y, s = run(as_rows(x, k), weight, *arguments)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n), s


def _backward(
    dy: Tensor, x: Tensor, weight: Weight, *arguments: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    n, k = weight.shape
    run = OP_BACKWARD.run(dy.device.type, dy.dtype, _dense_dtype(weight))
    dx, dA, dB = run(as_rows(dy, n), as_rows(x, k), weight, *arguments)
    return dx if dx is None or dy.dim() == 2 else dx.view(*dy.shape[:-1], k), dA, dB


def _dense_dtype(weight: Weight) -> torch.dtype | None:
    return weight.dtype if isinstance(weight, Tensor) else None


def bias_grads(
    dy: Tensor, scaling: float, bias: torch.dtype | None, lora_bias: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """(dbias, dlora_bias) for those whose dtype is given."""
    if bias is None and lora_bias is None:
        return None, None
    total = sum_rows(dy, torch.float64 if dy.dtype == torch.float64 else torch.float32)
    return (
        None if bias is None else total.to(bias),
        None if lora_bias is None else (total * scaling).to(lora_bias),
    )


# --- autograd, eager: without the dispatcher, which costs more than a small matmul ----------------


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        bias: Tensor | None,
        lora_bias: Tensor | None,
        dropout_p: float,
        seed: Tensor | None,
    ) -> Tensor:
        y, s = _forward(x, weight, lora_A, lora_B, scaling, bias, lora_bias, dropout_p, seed, False)
        dense = weight if isinstance(weight, Tensor) else None
        ctx.save_for_backward(x, lora_A, lora_B, s, seed, dense)
        ctx.quantized = weight if dense is None else None
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        need = ctx.needs_input_grad
        ctx.bias_dtype = bias.dtype if bias is not None and need[5] else None
        ctx.lora_bias_dtype = lora_bias.dtype if lora_bias is not None and need[6] else None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, s, seed, dense = ctx.saved_tensors
        weight = ctx.quantized if dense is None else dense
        need = ctx.needs_input_grad
        dx = dA = dB = None
        if need[0] or need[2] or need[3]:
            dx, dA, dB = _backward(
                dy,
                x,
                weight,
                lora_A,
                lora_B,
                s,
                ctx.scaling,
                ctx.dropout_p,
                seed,
                need[0],
                need[2],
                need[3],
            )
        dbias, dlora_bias = bias_grads(dy, ctx.scaling, ctx.bias_dtype, ctx.lora_bias_dtype)
        return dx, None, dA, dB, None, dbias, dlora_bias, None, None


# --- torch.library: what torch.compile, export and fake tensors see -------------------------------

_A = 1 + ARGUMENTS  # position of lora_A among the op's arguments


def _run(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _forward(x, unflatten(args[:ARGUMENTS]), *args[ARGUMENTS:])


def _run_backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    grads = _backward(dy, x, unflatten(args[:ARGUMENTS]), *args[ARGUMENTS:])
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


def _fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.new_empty(*x.shape[:-1], args[ARGUMENTS - 2])
    rows = x.shape[:-1].numel()
    return y, x.new_empty(rows, args[ARGUMENTS].shape[0], dtype=acc)


def _fake_backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    lora_A, lora_B = args[ARGUMENTS : ARGUMENTS + 2]
    return tuple(
        like.new_empty(like.shape) if need else dy.new_empty(0)
        for like, need in zip((x, lora_A, lora_B), args[-3:], strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, lora_A, lora_B, scaling, bias, lora_bias, dropout_p, seed, _ = (inputs[0], *inputs[_A:])
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, *inputs[1:6], lora_A, lora_B, output[1], seed)
    ctx.plain = inputs[6:_A]
    ctx.scaling, ctx.dropout_p = scaling, dropout_p
    need = ctx.needs_input_grad
    ctx.bias_dtype = bias.dtype if bias is not None and need[_A + 3] else None
    ctx.lora_bias_dtype = lora_bias.dtype if lora_bias is not None and need[_A + 4] else None


def _library_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, *weight, lora_A, lora_B, s, seed = ctx.saved_tensors
    need = [ctx.needs_input_grad[i] for i in (0, _A, _A + 1)]
    grads: list[Tensor | None] = [None] * (_A + 8)
    if any(need):
        results = _op_backward(
            dy,
            x,
            *weight,
            *ctx.plain,
            lora_A,
            lora_B,
            s,
            ctx.scaling,
            ctx.dropout_p,
            seed,
            *need,
        )
        for position, result, needed in zip((0, _A, _A + 1), results, need, strict=True):
            grads[position] = result if needed else None
    grads[_A + 3], grads[_A + 4] = bias_grads(dy, ctx.scaling, ctx.bias_dtype, ctx.lora_bias_dtype)
    return tuple(grads)


_op = define(
    f"lora_linear(Tensor x, {SCHEMA}, Tensor lora_A, Tensor lora_B, float scaling, Tensor? bias, "
    "Tensor? lora_bias, float dropout_p, Tensor? seed, bool int16) -> (Tensor, Tensor)",
    _run,
    _fake,
    _library_backward,
    _setup_context,
)
_op_backward = define(
    f"lora_linear_backward(Tensor dy, Tensor x, {SCHEMA}, Tensor lora_A, Tensor lora_B, Tensor s, "
    "float scaling, float dropout_p, Tensor? seed, bool need_dx, bool need_dA, bool need_dB) "
    "-> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
