"""linear_cross_entropy: the loss of a model's last layer, whose logits never all exist at once.

A vocabulary is large: the logits and their gradient are the largest tensors of a training step.
Here a block of rows has its logits computed, then its loss, then, over the logits, their gradient,
and from that the gradient of x, which is all that is kept. Rows that are ignored cost nothing on
CPUs; on GPUs they are computed like the rest, as to find them the host would have to wait.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fusetune.ops import _check, _cpu, _triton
from fusetune.ops._registry import Impl, Op, define, plain
from fusetune.ops._saved import hooked, owned
from fusetune.ops._weight import as_rows
from fusetune.ops.cross_entropy import OP as CROSS_ENTROPY
from fusetune.ops.cross_entropy import OP_BACKWARD as CROSS_ENTROPY_BACKWARD
from fusetune.ops.cross_entropy import check_target
from fusetune.ops.linear import OP as LINEAR
from fusetune.ops.linear import OP_DX as LINEAR_DX
from fusetune.reference import linear_cross_entropy as reference

Tensor = torch.Tensor

# Rows at a time: from so many on the weight, read once a block, costs little beside the products.
_CPU_ROWS = 256
_GPU_ROWS = 1024


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The cross-entropy of x [M, K] times the transpose of weight [V, K], plus bias [V].

    x, weight, bias: float16, bfloat16, float32 or float64, all of one dtype; weight and bias are
    frozen. target, ignore_index, reduction, label_smoothing and the result: as `cross_entropy`'s,
    of logits in x's dtype. Differentiable, once, in x, whose gradient is computed with the loss:
    blocks of logits are all that is ever held of them.

    Raises TypeError or ValueError, naming the argument, for shapes, dtypes, devices or class
    indices that do not fit, and for a weight or bias that requires grad.
    Source: Hsu et al. 2024, "Liger Kernel" (arXiv 2410.10989), FusedLinearCrossEntropy.
    """
    _check_arguments(x, weight, target, bias, reduction, label_smoothing)
    plain_arguments = (ignore_index, label_smoothing)
    wants = torch.is_grad_enabled() and x.requires_grad
    if torch.compiler.is_compiling() or not plain(x):
        loss = _op(x, weight, bias, target, *plain_arguments, wants)[0]
    elif wants:
        loss = _LinearCrossEntropy.apply(x, weight, bias, target, *plain_arguments)
    else:
        loss = _forward(x, weight, bias, target, *plain_arguments, False)[0]
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / (target != ignore_index).sum()


def _check_arguments(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    reduction: str,
    label_smoothing: float,
) -> None:
    _check.check_float("weight", weight)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(
            f"weight must be a matrix [V, K] with V > 0, got shape {list(weight.shape)}"
        )
    _check.check_x(x, weight.shape[1])
    if x.dim() != 2:
        raise ValueError(f"x must be a matrix [M, {weight.shape[1]}], got shape {list(x.shape)}")
    _check.check_device("weight", weight, x)
    _check.check_optional("bias", bias, weight.shape[0], x)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, x {x.dtype}: convert one of them")
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(f"{name} requires grad, but it is treated as frozen: detach it")
    check_target("x", x, target, reduction, label_smoothing)


# --- implementations ------------------------------------------------------------------------------


def _cpu_blocks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    want_dx: bool,
) -> tuple[Tensor, Tensor]:
    kept = (target != ignore_index).nonzero().squeeze(1)
    _check_classes(target, kept, len(weight))
    loss = torch.zeros(len(x), dtype=torch.float32, device=x.device)
    dx = torch.zeros(len(x) if want_dx else 0, x.shape[1], dtype=x.dtype, device=x.device)
    case = (x.device.type, x.dtype, weight.dtype)
    linear, linear_dx = LINEAR.run(*case), LINEAR_DX.run(*case)
    all_kept = len(kept) == len(x)
    for rows in _slices(len(x), _CPU_ROWS) if all_kept else kept.split(_CPU_ROWS):
        logits = linear(x[rows], weight, bias)
        loss[rows], dlogits = _block(logits, target[rows], ignore_index, label_smoothing, want_dx)
        if want_dx:
            dx[rows] = linear_dx(dlogits, weight)
        del logits, dlogits  # before there are the next block's
    return loss, dx


def _gpu_blocks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    want_dx: bool,
) -> tuple[Tensor, Tensor]:
    loss = torch.empty(len(x), dtype=torch.float32, device=x.device)
    dx = torch.empty(len(x) if want_dx else 0, x.shape[1], dtype=x.dtype, device=x.device)
    for rows in _slices(len(x), _GPU_ROWS):
        logits = torch.nn.functional.linear(x[rows], weight, bias)
        loss[rows], dlogits = _block(logits, target[rows], ignore_index, label_smoothing, want_dx)
        if want_dx:
            torch.mm(dlogits, weight, out=dx[rows])
        del logits, dlogits
    return loss, dx


def _block(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, want_dx: bool
) -> tuple[Tensor, Tensor]:
    """(loss, its gradient over the logits: in their place)."""
    case = (logits.device.type, logits.dtype, None)
    loss, lse = CROSS_ENTROPY.run(*case)(logits, target, ignore_index, label_smoothing)
    if want_dx:
        plain = (target, lse, ignore_index, label_smoothing, True)
        logits = CROSS_ENTROPY_BACKWARD.run(*case)(torch.ones_like(loss), logits, *plain)
    return loss, logits


def _slices(rows: int, step: int) -> list[slice]:
    return [slice(i, i + step) for i in range(0, rows, step)]


def _check_classes(target: Tensor, kept: Tensor, classes: int) -> None:
    """Before any work, and by the place in the whole of `target`."""
    used = target[kept]
    bad = ((used < 0) | (used >= classes)).nonzero()
    if len(bad):
        first = int(kept[bad[0, 0]])
        raise ValueError(
            f"target[{first}] is {int(target[first])}, neither in [0, {classes}) nor ignore_index"
        )


def _reference(*args: Any) -> tuple[Tensor, Tensor]:
    _, weight, _, target, ignore_index, _, _ = args
    if target.device.type == "cpu":
        _check_classes(target, (target != ignore_index).nonzero().squeeze(1), len(weight))
    return reference.linear_cross_entropy(*args)


OP = Op(
    "linear_cross_entropy",
    Impl("triton", _gpu_blocks, _triton.supports, 20),
    Impl(
        "cpu",
        _cpu_blocks,
        _cpu.supports("linear", "linear_dx", "cross_entropy", "cross_entropy_backward"),
        10,
    ),
    Impl("reference", _reference, lambda case: None, 0),
)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    want_dx: bool,
) -> tuple[Tensor, Tensor]:
    run = OP.run(x.device.type, x.dtype, weight.dtype)
    rows = as_rows(x, x.shape[1])
    loss, dx = run(rows, weight, bias, target, ignore_index, label_smoothing, want_dx)
    return loss, dx


def _scaled(dx: Tensor, dloss: Tensor) -> Tensor:
    return (dx * dloss[:, None]).to(dx.dtype)


# --- autograd, eager ------------------------------------------------------------------------------


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        ignore_index: int,
        label_smoothing: float,
    ) -> Tensor:
        loss, dx = _forward(x, weight, bias, target, ignore_index, label_smoothing, True)
        ctx.save_for_backward(dx)
        ctx.hooked = hooked()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        (dx,) = ctx.saved_tensors
        in_place = not ctx.hooked and owned(dx)
        dx = dx.mul_(dloss[:, None]) if in_place else _scaled(dx, dloss)
        return dx, None, None, None, None, None


# --- torch.library: what torch.compile, export and fake tensors see -------------------------------


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    want_dx: bool,
) -> tuple[Tensor, Tensor]:
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(len(x), dtype=acc), x.new_empty(len(x) if want_dx else 0, x.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, dloss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    (dx,) = ctx.saved_tensors
    return _scaled(dx, dloss), None, None, None, None, None, None


_op = define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, "
    "int ignore_index, float label_smoothing, bool want_dx) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _gradient,
    _setup_context,
)
