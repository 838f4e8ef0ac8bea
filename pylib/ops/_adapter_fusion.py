"""fusion_attend: ctx = sum_i p_i values_i, p = softmax_i(drop(g . values_i + offset) / T).

The core of adapter_fusion; T is its temperature. The values are read once each way. Kept for the
backward pass are g and the values (by reference), and p: one number for each row and adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fusetune.ops._adapter_fusion_cpu import CPU_BACKWARD, CPU_FORWARD
from fusetune.ops._adapter_fusion_gpu import GPU_BACKWARD, GPU_FORWARD
from fusetune.ops._registry import Impl, Op, define, plain
from fusetune.ops._weight import as_rows
from fusetune.reference import adapter_fusion as reference

Tensor = torch.Tensor


def attend(
    g: Tensor,
    values: list[Tensor],
    offset: Tensor | None,
    temperature: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """g [M, H], values: stacks [n, M, H], N adapters in all; offset [M] like p -> ctx, p [M, N].

    g is in the values' dtype or in that of p: fp32, or float64 for float64. ctx is in g's dtype.
    seed: int64 [1] where scores are dropped out. Differentiable, once, in g, values and offset; p
    carries no gradient. Arguments are trusted.
    """
    if torch.compiler.is_compiling() or not all(map(plain, (g, *values))):
        ctx, p = _op(g, values, offset, temperature, dropout_p, seed)
    elif torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (g, offset, *values)
    ):
        ctx, p = _FusionAttend.apply(g, offset, temperature, dropout_p, seed, *values)
    else:
        ctx, p = _forward(g, values, offset, temperature, dropout_p, seed)
    return ctx, p


# --- implementations ---- -------------------------------------------------------------------------


OP = Op(
    "fusion_attend",
    GPU_FORWARD,
    CPU_FORWARD,
    Impl("reference", reference.fusion_attend, lambda case: None, 0),
)
OP_BACKWARD = Op(
    "fusion_attend_backward",
    GPU_BACKWARD,
    CPU_BACKWARD,
    Impl("reference", reference.fusion_attend_backward, lambda case: None, 0),
)


def with_contiguous_rows(part: Tensor) -> Tensor:
    """A stack [n, M, H] whose rows are contiguous. Copies only where it has to."""
    part = part.resolve_neg()
    return part if part.stride(2) == 1 else part.contiguous()


def _forward(
    g: Tensor,
    values: Sequence[Tensor],
    offset: Tensor | None,
    temperature: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    run = OP.run(g.device.type, g.dtype, values[0].dtype)
    stacks = [with_contiguous_rows(part) for part in values]
    ctx, p = run(as_rows(g, g.shape[1]), stacks, offset, temperature, dropout_p, seed)
    return ctx, p


def _backward(
    dctx: Tensor,
    g: Tensor,
    values: Sequence[Tensor],
    p: Tensor,
    temperature: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dvalues: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    run = OP_BACKWARD.run(g.device.type, g.dtype, values[0].dtype)
    stacks = [with_contiguous_rows(part) for part in values]
    h = g.shape[1]
    rows = as_rows(dctx, h), as_rows(g, h), stacks, p
    dg, dvalues, doffset = run(*rows, temperature, dropout_p, seed, need_dvalues)
    return dg, dvalues, doffset


# --- autograd, eager ---- -------------------------------------------------------------------------


class _FusionAttend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        offset: Tensor | None,
        temperature: float,
        dropout_p: float,
        seed: Tensor | None,
        *values: Tensor,
    ) -> tuple[Tensor, Tensor]:
        out, p = _forward(g, values, offset, temperature, dropout_p, seed)
        ctx.save_for_backward(g, p, seed, *values)
        ctx.plain = (temperature, dropout_p)
        ctx.mark_non_differentiable(p)
        return out, p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dctx: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        g, p, seed, *values = ctx.saved_tensors
        temperature, dropout_p = ctx.plain
        need_dvalues = any(ctx.needs_input_grad[5:])
        dg, dvalues, doffset = _backward(
            dctx, g, values, p, temperature, dropout_p, seed, need_dvalues
        )
        no_gradients = [None] * len(values)
        need_doffset = ctx.needs_input_grad[1]
        return dg, doffset if need_doffset else None, None, None, None, *(dvalues or no_gradients)


# --- torch.library: what torch.compile, export and fake tensors see -------------------------------


def _fake(
    g: Tensor,
    values: Sequence[Tensor],
    offset: Tensor | None,
    temperature: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    acc = torch.float64 if g.dtype == torch.float64 else torch.float32
    adapters = sum(part.shape[0] for part in values)
    return g.new_empty(g.shape), g.new_empty(g.shape[0], adapters, dtype=acc)


def _fake_backward(
    dctx: Tensor,
    g: Tensor,
    values: Sequence[Tensor],
    p: Tensor,
    temperature: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dvalues: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    dvalues = [part.new_empty(part.shape) for part in values] if need_dvalues else []
    return g.new_empty(g.shape), dvalues, p.new_empty(p.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    g, values, offset, temperature, dropout_p, seed = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(g, output[1], seed, *values)
    ctx.plain = (temperature, dropout_p)
    ctx.needs = (any(part.requires_grad for part in values), offset is not None)


def _library_backward(ctx: Any, dctx: Tensor, _: Tensor) -> tuple[Any, ...]:
    g, p, seed, *values = ctx.saved_tensors
    need_dvalues, has_offset = ctx.needs
    dg, dvalues, doffset = _op_backward(dctx, g, values, p, *ctx.plain, seed, need_dvalues)
    gradients = dvalues if need_dvalues else [None] * len(values)
    return dg, gradients, doffset if has_offset else None, None, None, None


_ARGUMENTS = "float temperature, float dropout_p, Tensor? seed"
_op = define(
    f"fusion_attend(Tensor g, Tensor[] values, Tensor? offset, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _library_backward,
    _setup_context,
)
_op_backward = define(
    "fusion_attend_backward(Tensor dctx, Tensor g, Tensor[] values, Tensor p, "
    f"{_ARGUMENTS}, bool need_dvalues) -> (Tensor, Tensor[], Tensor)",
    _backward,
    _fake_backward,
)
