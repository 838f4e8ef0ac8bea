"""multi_lora_linear's implementations, autograd and torch.library; arguments are trusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fusetune.ops._multi_lora_linear_cpu import CPU_BACKWARD, CPU_FORWARD
from fusetune.ops._multi_lora_linear_gpu import GPU_BACKWARD, GPU_FORWARD
from fusetune.ops._registry import Impl, Op, decode_int16, define, plain
from fusetune.ops._weight import ARGUMENTS, SCHEMA, Weight, as_rows, flatten, unflatten
from fusetune.ops.linear_4bit import sum_rows
from fusetune.reference import multi_lora_linear as reference

Tensor = torch.Tensor


def apply(
    x: Tensor,
    weight: Weight,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: list[float],
    adapter_of: list[int] | None,
    bias: Tensor | None,
    lora_bias: Tensor | None,
    dropout_p: list[float],
    seeds: Tensor | None,
) -> Tensor:
    """As `ops.multi_lora_linear`. lora_bias: [adapters, N], scaled; seeds: int64 [adapters]."""
    grad = torch.is_grad_enabled()
    int16 = decode_int16() and not grad
    factors = (list(lora_A), list(lora_B))
    settings = (scaling, adapter_of, bias, lora_bias, dropout_p, seeds)
    if torch.compiler.is_compiling() or not plain(x):
        y: Tensor = _op(x, *flatten(weight), *factors, *settings, int16)[0]
        return y
    if grad and _any_requires_grad(x, bias, lora_bias, *lora_A, *lora_B):
        y = _MultiLoraLinear.apply(x, weight, *settings, *lora_A, *lora_B)
        return y
    return _forward(x, weight, *factors, *settings, int16)[0]


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


# --- implementations ------------------------------------------------------------------------------


def _reference_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    return reference.multi_lora_linear(*arguments[:-1])  # its last one, int16, is an approximation


OP = Op(
    "multi_lora_linear",
    GPU_FORWARD,
    CPU_FORWARD,
    Impl("reference", _reference_forward, lambda case: None, 0),
)
OP_BACKWARD = Op(
    "multi_lora_linear_backward",
    GPU_BACKWARD,
    CPU_BACKWARD,
    Impl("reference", reference.multi_lora_linear_backward, lambda case: None, 0),
)


def _dense_dtype(weight: Weight) -> torch.dtype | None:
    return weight.dtype if isinstance(weight, Tensor) else None


def _forward(x: Tensor, weight: Weight, *arguments: Any) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    run = OP.run(x.device.type, x.dtype, _dense_dtype(weight))
    y, s = run(as_rows(x, k), weight, *arguments)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n), s


def _backward(
    dy: Tensor, x: Tensor, weight: Weight, *arguments: Any
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    n, k = weight.shape
    run = OP_BACKWARD.run(dy.device.type, dy.dtype, _dense_dtype(weight))
    dx, dA, dB = run(as_rows(dy, n), as_rows(x, k), weight, *arguments)
    return dx if dx is None or dy.dim() == 2 else dx.view(*dy.shape[:-1], k), dA, dB


def _bias_grads(
    dy: Tensor,
    adapter_of: Sequence[int] | None,
    bias: torch.dtype | None,
    lora_bias: torch.dtype | None,
    count: int,
) -> tuple[Tensor | None, Tensor | None]:
    """(dbias, dlora_bias) for those whose dtype is given."""
    dbias = None if bias is None else sum_rows(dy, bias)
    if lora_bias is None:
        return dbias, None
    if adapter_of is None:
        return dbias, sum_rows(dy, lora_bias).expand(count, -1)
    of_rows = dy.flatten(1, -2).sum(1, dtype=lora_bias) if dy.dim() > 2 else dy.to(lora_bias)
    numbers = [owner + 1 for owner in adapter_of]  # 0: of none
    owners = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    owners = owners.to(dy.device, non_blocking=True)  # the host does not wait
    sums = of_rows.new_zeros(count + 1, dy.shape[-1])
    if dy.is_cpu:
        return dbias, sums.index_add(0, owners, of_rows)[1:]
    # On a GPU index_add's result would change from run to run.
    return dbias, sums.index_put((owners,), of_rows, accumulate=True)[1:]


# --- autograd, eager: without the dispatcher ------------------------------------------------------


class _MultiLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        scaling: list[float],
        adapter_of: list[int] | None,
        bias: Tensor | None,
        lora_bias: Tensor | None,
        dropout_p: list[float],
        seeds: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        count = len(scaling)
        lora_A, lora_B = factors[:count], factors[count:]
        settings = (scaling, adapter_of, bias, lora_bias, dropout_p, seeds)
        y, s = _forward(x, weight, lora_A, lora_B, *settings, False)
        dense = weight if isinstance(weight, Tensor) else None
        ctx.save_for_backward(x, s, seeds, dense, *factors)
        ctx.quantized = weight if dense is None else None
        ctx.scaling, ctx.adapter_of, ctx.dropout_p = scaling, adapter_of, dropout_p
        need = ctx.needs_input_grad
        ctx.bias_dtype = bias.dtype if bias is not None and need[4] else None
        ctx.lora_bias_dtype = lora_bias.dtype if lora_bias is not None and need[5] else None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, s, seeds, dense, *factors = ctx.saved_tensors
        weight = ctx.quantized if dense is None else dense
        count = len(ctx.scaling)
        need_dx, need = ctx.needs_input_grad[0], list(ctx.needs_input_grad[8:])
        dx: Tensor | None = None
        grads: list[Tensor | None] = [None] * (2 * count)
        if need_dx or any(need):
            settings = (ctx.scaling, ctx.adapter_of, ctx.dropout_p, seeds)
            low = (factors[:count], factors[count:], s)
            needs = (need_dx, need[:count], need[count:])
            dx, dA, dB = _backward(dy, x, weight, *low, *settings, *needs)
            grads = [*dA, *dB]
        dtypes = (ctx.bias_dtype, ctx.lora_bias_dtype)
        dbias, dlora_bias = _bias_grads(dy, ctx.adapter_of, *dtypes, count)
        return dx, None, None, None, dbias, dlora_bias, None, None, *grads


# --- torch.library: what torch.compile, export and fake tensors see -------------------------------

_A = 1 + ARGUMENTS  # position of lora_A among the op's arguments


def _run(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _forward(x, unflatten(args[:ARGUMENTS]), *args[ARGUMENTS:])


def _run_backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    dx, dA, dB = _backward(dy, x, unflatten(args[:ARGUMENTS]), *args[ARGUMENTS:])
    return _or_empty(dy, [dx])[0], _apart(_or_empty(dy, dA)), _apart(_or_empty(dy, dB))


def _apart(grads: Sequence[Tensor]) -> list[Tensor]:
    """Each in memory of its own, which torch.library asks for: GPUs' lie in one tensor."""
    return [g if g.untyped_storage().nbytes() == g.nbytes else g.clone() for g in grads]


def _or_empty(dy: Tensor, grads: Sequence[Tensor | None]) -> list[Tensor]:
    return [dy.new_empty(0) if grad is None else grad for grad in grads]


def _fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    lora_A, adapter_of = args[ARGUMENTS], args[ARGUMENTS + 3]
    ranks = [a.shape[0] for a in lora_A]
    if adapter_of is None:
        size = x.shape[:-1].numel() * sum(ranks)
    else:
        size = x.shape[1:-1].numel() * sum(ranks[owner] for owner in adapter_of if owner >= 0)
    return x.new_empty(*x.shape[:-1], args[ARGUMENTS - 2]), x.new_empty(size, dtype=acc)


def _fake_backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    def like(tensors: Sequence[Tensor], need: Sequence[bool]) -> list[Tensor]:
        return [
            t.new_empty(t.shape) if needed else dy.new_empty(0)
            for t, needed in zip(tensors, need, strict=True)
        ]

    lora_A, lora_B = args[ARGUMENTS : ARGUMENTS + 2]
    need_dx, need_dA, need_dB = args[-3:]
    return like([x], [need_dx])[0], like(lora_A, need_dA), like(lora_B, need_dB)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    lora_A, lora_B, *settings = inputs[_A:]
    ctx.scaling, ctx.adapter_of, bias, lora_bias, ctx.dropout_p, seeds, _ = settings
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], *inputs[1:6], output[1], seeds, *lora_A, *lora_B)
    ctx.plain = inputs[6:_A]
    ctx.bias_dtypes = [None if t is None else t.dtype for t in (bias, lora_bias)]


def _library_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    x, *weight = ctx.saved_tensors[:6]
    s, seeds, *factors = ctx.saved_tensors[6:]
    count = len(ctx.scaling)
    need = ctx.needs_input_grad  # only here, not in the forward pass, with its lists as they were
    need_dx, need_dA, need_dB = (need[i] for i in (0, _A, _A + 1))
    grads: list[Any] = [None] * (_A + 9)
    grads[_A] = grads[_A + 1] = [None] * count
    if need_dx or any(need_dA) or any(need_dB):
        settings = (ctx.scaling, ctx.adapter_of, ctx.dropout_p, seeds)
        low = (factors[:count], factors[count:], s)
        needs = (need_dx, list(need_dA), list(need_dB))
        dx, dA, dB = _op_backward(dy, x, *weight, *ctx.plain, *low, *settings, *needs)
        grads[0] = dx if need_dx else None
        grads[_A] = [g if needed else None for g, needed in zip(dA, need_dA, strict=True)]
        grads[_A + 1] = [g if needed else None for g, needed in zip(dB, need_dB, strict=True)]
    bias, lora_bias = (
        dtype if need[place] else None for place, dtype in enumerate(ctx.bias_dtypes, _A + 4)
    )
    grads[_A + 4], grads[_A + 5] = _bias_grads(dy, ctx.adapter_of, bias, lora_bias, count)
    return tuple(grads)


_SETTINGS = "float[] scaling, int[]? adapter_of"
_op = define(
    f"multi_lora_linear(Tensor x, {SCHEMA}, Tensor[] lora_A, Tensor[] lora_B, {_SETTINGS}, "
    "Tensor? bias, Tensor? lora_bias, float[] dropout_p, Tensor? seeds, bool int16) "
    "-> (Tensor, Tensor)",
    _run,
    _fake,
    _library_backward,
    _setup_context,
)
_op_backward = define(
    f"multi_lora_linear_backward(Tensor dy, Tensor x, {SCHEMA}, Tensor[] lora_A, Tensor[] lora_B, "
    f"Tensor s, {_SETTINGS}, float[] dropout_p, Tensor? seeds, bool need_dx, bool[] need_dA, "
    "bool[] need_dB) -> (Tensor, Tensor[], Tensor[])",
    _run_backward,
    _fake_backward,
)
