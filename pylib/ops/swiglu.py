"""swiglu: y = silu(gate) up, the activation of gated MLPs, in one pass each way.

PyTorch takes two operators and keeps silu(gate) for the backward pass, which takes three more.
Here gate and up are kept, and their gradients written over them where nothing else holds them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fusetune.ops import _check, _cpu
from fusetune.ops._registry import LIB, Impl, Op, plain
from fusetune.ops._saved import hooked, owned
from fusetune.ops._weight import as_rows
from fusetune.reference import swiglu as reference

Tensor = torch.Tensor
Gradients = tuple[Tensor | None, Tensor | None]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) times up, both [..., N]: y [..., N] in their dtype.

    float16, bfloat16, float32 or float64, any strides; computed in fp32 (float64 for float64) and
    rounded once. Differentiable, once, in both.

    Raises TypeError or ValueError, naming the argument, for shapes, dtypes or devices that do not
    fit.
    """
    _check_arguments(gate, up)
    if torch.compiler.is_compiling() or not (plain(gate) and plain(up)):
        y: Tensor = _op(gate, up)
        return y
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        y = _Swiglu.apply(gate, up)
        return y
    return _forward(gate, up)


def _check_arguments(gate: Tensor, up: Tensor) -> None:
    _check.check_float("gate", gate)
    _check.check_float("up", up)
    if gate.dim() == 0:
        raise ValueError("gate must have shape [..., N], got []")
    _check.check_shape("up", up, tuple(gate.shape))
    if up.dtype != gate.dtype:
        raise TypeError(f"up is {up.dtype}, gate {gate.dtype}: they must have the same dtype")
    if up.device != gate.device:
        raise ValueError(f"up is on {up.device}, gate on {gate.device}: move one of them")


# --- implementations ---- -------------------------------------------------------------------------


def _cpu_forward(gate: Tensor, up: Tensor) -> Tensor:
    m, n = gate.shape
    y = _cpu.empty(m, n, dtype=gate.dtype)
    _cpu.kernels().swiglu(_cpu.matrix(gate), _cpu.matrix(up), m, n, _cpu.matrix(y))
    return y


def _cpu_backward(dy: Tensor, gate: Tensor, up: Tensor, out: Gradients) -> None:
    m, n = gate.shape
    nothing = (0, 0, _cpu.DTYPE_CODES[gate.dtype])
    to = [nothing if tensor is None else _cpu.matrix(tensor) for tensor in out]
    arguments = (_cpu.matrix(tensor) for tensor in (dy, gate, up))
    _cpu.kernels().swiglu_backward(*arguments, m, n, *to)


OP = Op(
    "swiglu",
    Impl("cpu", _cpu_forward, _cpu.supports("swiglu"), 10),
    Impl("reference", reference.swiglu, lambda case: None, 0),
)
OP_BACKWARD = Op(
    "swiglu_backward",
    Impl("cpu", _cpu_backward, _cpu.supports("swiglu_backward"), 10),
    Impl("reference", reference.swiglu_backward, lambda case: None, 0),
)


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    n = gate.shape[-1]
    run = OP.run(gate.device.type, gate.dtype, None)
    y: Tensor = run(as_rows(gate, n), as_rows(up, n))
    return y.view(gate.shape)


def _backward(dy: Tensor, gate: Tensor, up: Tensor, out: list[Tensor | None]) -> None:
    """Writes dgate and dup to `out`, without gaps and of gate's shape, None where not needed."""
    n = gate.shape[-1]
    run = OP_BACKWARD.run(gate.device.type, gate.dtype, None)
    to = tuple(None if tensor is None else tensor.view(-1, n) if n else None for tensor in out)
    run(as_rows(dy, n), as_rows(gate, n), as_rows(up, n), to)


# --- autograd, eager ---- -------------------------------------------------------------------------


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate.detach(), up.detach())
        ctx.hooked = hooked()
        return _forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        saved = ctx.saved_tensors
        out: list[Tensor | None] = [None, None]
        for i, tensor in enumerate(saved):
            if ctx.needs_input_grad[i]:
                in_place = not ctx.hooked and owned(tensor)
                out[i] = tensor if in_place else _empty_like(tensor)
        _backward(dy, saved[0], saved[1], out)
        return out[0], out[1]


def _empty_like(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return _cpu.empty(*tensor.shape, dtype=tensor.dtype)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


# --- torch.library: what torch.compile, export and fake tensors see -------------------------------


def _both(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = _empty_like(gate), _empty_like(up)
    _backward(dy, gate, up, [dgate, dup])
    return dgate, dup


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _fake_both(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _fake(gate, up), _fake(gate, up)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _op_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = _op_backward(dy, *ctx.saved_tensors)
    return dgate, dup


LIB.define("swiglu(Tensor gate, Tensor up) -> Tensor")
LIB.impl("swiglu", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("fusetune::swiglu", _fake, lib=LIB)
torch.library.register_autograd(
    "fusetune::swiglu", _op_gradient, setup_context=_setup_context, lib=LIB
)
LIB.define("swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)")
LIB.impl("swiglu_backward", _both, "CompositeExplicitAutograd")
torch.library.register_fake("fusetune::swiglu_backward", _fake_both, lib=LIB)
_op = torch.ops.fusetune.swiglu.default
_op_backward = torch.ops.fusetune.swiglu_backward.default
