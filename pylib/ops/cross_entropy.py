"""cross_entropy: the loss over a vocabulary, without a second tensor of the logits' size.

PyTorch keeps the log-softmax of the logits for the backward pass and makes two more such tensors
there. Here the forward pass keeps one number a row and the backward pass writes the gradient only:
over the logits themselves where the graph is all that still holds them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fusetune.ops import _check, _cpu, _triton
from fusetune.ops._registry import Impl, Op, define, plain
from fusetune.ops._saved import hooked, owned
from fusetune.ops._weight import as_rows
from fusetune.reference import cross_entropy as reference

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The cross-entropy of logits [M, V] against class indices target [M].

    logits: float16, bfloat16, float32 or float64; computed and returned in fp32 (float64 for
    float64) whatever their dtype. target: int64, each in [0, V) or ignore_index. reduction: "mean"
    over rows that are not ignored (NaN where all are), "sum", or "none" for [M]. Differentiable,
    once, in logits.

    Raises TypeError or ValueError, naming the argument, for shapes, dtypes, devices or class
    indices that do not fit. Source: torch.nn.functional.cross_entropy.
    """
    _check_arguments(logits, target, reduction, label_smoothing)
    if torch.compiler.is_compiling() or not plain(logits):
        loss = _op(logits, target, ignore_index, label_smoothing)[0]
    elif torch.is_grad_enabled() and logits.requires_grad:
        loss = _CrossEntropy.apply(logits, target, ignore_index, label_smoothing)
    else:
        loss = _forward(logits, target, ignore_index, label_smoothing)[0]
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / (target != ignore_index).sum()


def _check_arguments(
    logits: torch.Tensor, target: torch.Tensor, reduction: str, label_smoothing: float
) -> None:
    _check.check_float("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape [M, V] with V > 0, got {list(logits.shape)}")
    check_target("logits", logits, target, reduction, label_smoothing)


def check_target(
    name: str, rows: torch.Tensor, target: torch.Tensor, reduction: str, label_smoothing: float
) -> None:
    """What is asked of the loss of `rows`, which the caller knows by `name`."""
    if not isinstance(target, torch.Tensor) or target.dtype != torch.int64:
        kind = target.dtype if isinstance(target, torch.Tensor) else type(target).__name__
        raise TypeError(f"target must be an int64 tensor of class indices, got {kind}")
    _check.check_shape("target", target, (rows.shape[0],))
    if target.device != rows.device:
        raise ValueError(f"target is on {target.device}, {name} on {rows.device}: move one")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")


# --- implementations ---- -------------------------------------------------------------------------


def _cpu_forward(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    m, v = logits.shape
    loss, lse = (_cpu.empty(m, dtype=torch.float32) for _ in range(2))
    target = target.contiguous()
    bad = _cpu.kernels().cross_entropy(
        _cpu.matrix(logits),
        m,
        v,
        target.data_ptr(),
        ignore_index,
        label_smoothing,
        loss.data_ptr(),
        lse.data_ptr(),
    )
    if bad >= 0:
        raise ValueError(
            f"target[{bad}] is {int(target[bad])}, neither in [0, {v}) nor ignore_index"
        )
    return loss, lse


def _cpu_backward(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    in_place: bool,
) -> torch.Tensor:
    m, v = logits.shape
    dlogits = logits if in_place else _cpu.empty(m, v, dtype=logits.dtype)
    dloss, target = dloss.contiguous(), target.contiguous()
    _cpu.kernels().cross_entropy_backward(
        _cpu.matrix(logits),
        m,
        v,
        target.data_ptr(),
        ignore_index,
        label_smoothing,
        lse.data_ptr(),
        dloss.data_ptr(),
        _cpu.matrix(dlogits),
    )
    return dlogits


def _triton_forward(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from fusetune._triton.cross_entropy import launch_cross_entropy

    with _triton.on(logits.device):
        pair: tuple[torch.Tensor, torch.Tensor] = launch_cross_entropy(
            logits, target.contiguous(), ignore_index, label_smoothing
        )
    return pair


def _triton_backward(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    in_place: bool,
) -> torch.Tensor:
    from fusetune._triton.cross_entropy import launch_cross_entropy_backward

    dlogits = logits
    if not in_place:
        dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    plain = (ignore_index, label_smoothing, dlogits)
    with _triton.on(logits.device):
        launch_cross_entropy_backward(dloss.contiguous(), logits, target.contiguous(), lse, *plain)
    return dlogits


def _reference_forward(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    v = logits.shape[1]
    bad = (target != ignore_index) & ((target < 0) | (target >= v))
    if logits.device.type == "cpu" and bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"target[{first}] is {int(target[first])}, neither in [0, {v}) nor ignore_index"
        )
    return reference.cross_entropy(logits, target, ignore_index, label_smoothing)


OP = Op(
    "cross_entropy",
    Impl("triton", _triton_forward, _triton.supports, 20),
    Impl("cpu", _cpu_forward, _cpu.supports("cross_entropy"), 10),
    Impl("reference", _reference_forward, lambda case: None, 0),
)
OP_BACKWARD = Op(
    "cross_entropy_backward",
    Impl("triton", _triton_backward, _triton.supports, 20),
    Impl("cpu", _cpu_backward, _cpu.supports("cross_entropy_backward"), 10),
    Impl("reference", reference.cross_entropy_backward, lambda case: None, 0),
)


def _forward(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = as_rows(logits, logits.shape[1])
    run = OP.run(logits.device.type, logits.dtype, None)
    loss, lse = run(rows, target, ignore_index, label_smoothing)
    return loss, lse


def _backward(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    in_place: bool = False,
) -> torch.Tensor:
    rows = as_rows(logits, logits.shape[1])
    run = OP_BACKWARD.run(logits.device.type, logits.dtype, None)
    dlogits: torch.Tensor = run(dloss, rows, target, lse, ignore_index, label_smoothing, in_place)
    return dlogits


# --- autograd, eager ---- -------------------------------------------------------------------------


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        ignore_index: int,
        label_smoothing: float,
    ) -> torch.Tensor:
        loss, lse = _forward(logits, target, ignore_index, label_smoothing)
        ctx.save_for_backward(logits.detach(), target, lse)
        ctx.plain = (ignore_index, label_smoothing)
        ctx.hooked = hooked()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, target, lse = ctx.saved_tensors
        in_place = not ctx.hooked and owned(logits)
        ignore_index, smoothing = ctx.plain
        dlogits = _backward(dloss, logits, target, lse, ignore_index, smoothing, in_place)
        return dlogits, None, None, None


# --- torch.library: what torch.compile, export and fake tensors see -------------------------------


def _fake(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss = logits.new_empty(logits.shape[0], dtype=acc)
    return loss, torch.empty_like(loss)


def _fake_backward(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> torch.Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, target, *ctx.plain = inputs
    ctx.save_for_backward(logits, target, output[1])
    ctx.mark_non_differentiable(output[1])


def _op_gradient(ctx: Any, dloss: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    return _op_backward(dloss, *ctx.saved_tensors, *ctx.plain), None, None, None


_ARGUMENTS = "int ignore_index, float label_smoothing"
_op = define(
    f"cross_entropy(Tensor logits, Tensor target, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _op_gradient,
    _setup_context,
)
_op_backward = define(
    "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, Tensor lse, "
    f"{_ARGUMENTS}) -> Tensor",
    _backward,
    _fake_backward,
)
