"""glu: y = f(gate) up, the activation of gated MLPs, in one pass each way.

PyTorch takes two operators and keeps f(gate) for the backward pass, which takes three more.
Here gate and up are kept, and their gradients written over them where nothing else holds them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fusetune.ops import _check, _cpu, _triton
from fusetune.ops._bottleneck_cpu import ACTIVATION_CODES
from fusetune.ops._registry import Impl, Op, define, plain
from fusetune.ops._saved import hooked, owned
from fusetune.ops._weight import as_rows
from fusetune.reference import glu as reference

Tensor = torch.Tensor
Gradients = tuple[Tensor | None, Tensor | None]
ACTIVATIONS = tuple(reference.ACTIVATIONS)


def glu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """f(gate) times up, both [..., N]: y [..., N] in their dtype. Shazeer 2020 (arXiv:2002.05202).

    activation: "silu" (SwiGLU), "gelu" (by erf) or "gelu_new" (by tanh; both GEGLU). gate, up:
    float16, bfloat16, float32 or float64, any strides; computed in fp32 (float64 for float64) and
    rounded once. Differentiable, once, in both.

    Raises TypeError or ValueError, naming the argument, for shapes, dtypes or devices that do not
    fit, and for another activation.
    """
    _check_arguments(gate, up, activation)
    if torch.compiler.is_compiling() or not (plain(gate) and plain(up)):
        y: Tensor = _op(gate, up, activation)
        return y
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        y = _Glu.apply(gate, up, activation)
        return y
    return _forward(gate, up, activation)


def _check_arguments(gate: Tensor, up: Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
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


def _cpu_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    m, n = gate.shape
    y = _cpu.empty(m, n, dtype=gate.dtype)
    code = ACTIVATION_CODES[activation]
    _cpu.kernels().glu(_cpu.matrix(gate), _cpu.matrix(up), m, n, code, _cpu.matrix(y))
    return y


def _cpu_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str, out: Gradients) -> None:
    m, n = gate.shape
    nothing = (0, 0, _cpu.DTYPE_CODES[gate.dtype])
    to = [nothing if tensor is None else _cpu.matrix(tensor) for tensor in out]
    arguments = (_cpu.matrix(tensor) for tensor in (dy, gate, up))
    _cpu.kernels().glu_backward(*arguments, m, n, ACTIVATION_CODES[activation], *to)


def _triton_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    from fusetune._triton.glu import launch_glu

    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    with _triton.on(gate.device):
        launch_glu(gate, up, activation, y)
    return y


def _triton_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str, out: Gradients) -> None:
    from fusetune._triton.glu import launch_glu_backward

    with _triton.on(gate.device):
        launch_glu_backward(dy, gate, up, activation, *out)


OP = Op(
    "glu",
    Impl("triton", _triton_forward, _triton.supports, 20),
    Impl("cpu", _cpu_forward, _cpu.supports("glu"), 10),
    Impl("reference", reference.glu, lambda case: None, 0),
)
OP_BACKWARD = Op(
    "glu_backward",
    Impl("triton", _triton_backward, _triton.supports, 20),
    Impl("cpu", _cpu_backward, _cpu.supports("glu_backward"), 10),
    Impl("reference", reference.glu_backward, lambda case: None, 0),
)


def _forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    n = gate.shape[-1]
    run = OP.run(gate.device.type, gate.dtype, None)
    y: Tensor = run(as_rows(gate, n), as_rows(up, n), activation)
    return y.view(gate.shape)


def _backward(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, out: list[Tensor | None]
) -> None:
    """Writes dgate and dup to `out`, without gaps and of gate's shape, None where not needed."""
    n = gate.shape[-1]
    run = OP_BACKWARD.run(gate.device.type, gate.dtype, None)
    to = tuple(None if tensor is None else tensor.view(-1, n) if n else None for tensor in out)
    run(as_rows(dy, n), as_rows(gate, n), as_rows(up, n), activation, to)


# --- autograd, eager ---- -------------------------------------------------------------------------


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate.detach(), up.detach())
        ctx.hooked, ctx.activation = hooked(), activation
        return _forward(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        saved = ctx.saved_tensors
        out: list[Tensor | None] = [None, None]
        for i, tensor in enumerate(saved):
            if ctx.needs_input_grad[i]:
                in_place = not ctx.hooked and owned(tensor)
                out[i] = tensor if in_place else _empty_like(tensor)
        _backward(dy, saved[0], saved[1], ctx.activation, out)
        return out[0], out[1], None


def _empty_like(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return _cpu.empty(*tensor.shape, dtype=tensor.dtype)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


# --- torch.library: what torch.compile, export and fake tensors see -------------------------------


def _both(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dgate, dup = _empty_like(gate), _empty_like(up)
    _backward(dy, gate, up, activation, [dgate, dup])
    return dgate, dup


def _fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _fake_both(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return _fake(gate, up, activation), _fake(gate, up, activation)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.activation = inputs[2]


def _op_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    dgate, dup = _op_backward(dy, *ctx.saved_tensors, ctx.activation)
    return dgate, dup, None


_op = define(
    "glu(Tensor gate, Tensor up, str activation) -> Tensor",
    _forward,
    _fake,
    _op_gradient,
    _setup_context,
)
_op_backward = define(
    "glu_backward(Tensor dy, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    _both,
    _fake_both,
)
