"""dropout: by counter, so that the mask is made again for the backward pass and never stored."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fusetune.ops import _check, _cpu
from fusetune.ops._registry import Impl, Op, define, plain
from fusetune.ops._weight import as_rows
from fusetune.reference import dropout as reference
from fusetune.reference.dropout import new_seed

Tensor = torch.Tensor


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """x [..., N] with each element dropped with probability p, the others times 1 / (1 - p).

    x: float16, bfloat16, float32 or float64, any strides. Srivastava et al. 2014 (JMLR 15). The
    seed is from torch's generator, the mask reference/dropout.py's, not that of
    torch.nn.functional.dropout. x itself where nothing is to be dropped. Differentiable, once.

    Raises TypeError or ValueError, naming the argument, for another dtype or a p outside [0, 1].
    """
    _check.check_float("x", x)
    if not 0 <= p <= 1:
        raise ValueError(f"p must be from 0 to 1, got {p}")
    if not training or p == 0:
        return x
    seed = new_seed(x.device)
    if torch.compiler.is_compiling() or not plain(x):
        y: Tensor = _op(x, float(p), seed)
        return y
    if torch.is_grad_enabled() and x.requires_grad:
        y = _Dropout.apply(x, float(p), seed)
        return y
    return _forward(x, float(p), seed)


# --- implementations ------------------------------------------------------------------------------


def _cpu_forward(x: Tensor, p: float, seed: Tensor) -> Tensor:
    m, k = x.shape
    y = _cpu.empty(m, k, dtype=x.dtype)
    drop = _cpu.dropout(p, seed)
    _cpu.kernels().dropout(_cpu.matrix(x), m, k, drop, _cpu.matrix(y))
    return y


OP = Op(
    "dropout",
    Impl("cpu", _cpu_forward, _cpu.supports("dropout"), 10),
    Impl("reference", reference.dropout, lambda case: None, 0),
)


def _forward(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Its own backward pass too: the gradient of y is dropped out like x."""
    rows = as_rows(x, x.shape[-1]) if x.dim() else x.view(1, 1)
    y: Tensor = OP.run(x.device.type, x.dtype, None)(rows, p, seed)
    return y.view(x.shape)


# --- autograd, eager ------------------------------------------------------------------------------


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: Tensor) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p = p
        return _forward(x, p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _forward(dy, ctx.p, ctx.saved_tensors[0]), None, None


# --- torch.library: what torch.compile, export and fake tensors see -------------------------------


def _fake(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])
    ctx.p = inputs[1]


def _library_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return _op(dy, ctx.p, ctx.saved_tensors[0]), None, None


_op = define(
    "dropout(Tensor x, float p, Tensor seed) -> Tensor",
    _forward,
    _fake,
    _library_backward,
    _setup_context,
)
