"""lora_grouped_linear: a LoRA linear layer for each group of rows, as a mixture's experts are.

PEFT adds scaling B A to the weights of all groups before every use: as many bytes as the weights
have, written and read, whatever few rows there are. Here each group's rows pass through its two
narrow factors, by `lora_linear`'s kernels; kept for the backward pass are x and s = x A^T.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fusetune.ops import _check, _cpu
from fusetune.ops._lora_linear_cpu import CPU_BACKWARD, CPU_FORWARD
from fusetune.ops._registry import Impl, Op
from fusetune.ops._weight import as_rows
from fusetune.reference import lora_grouped_linear as reference
from fusetune.reference.lora_grouped_linear import groups

Tensor = torch.Tensor
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def lora_grouped_linear(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, ends: list[int]
) -> Tensor:
    """x W_g^T + scaling x A_g^T B_g^T for the rows of each group g.

    x: [M, K], sorted by group; weight: [G, N, K], frozen, of any strides; lora_A: [G, r, K];
    lora_B: [G, N, r]; all float16, bfloat16, float32 or float64, not necessarily the same. ends:
    for each group one past its last row, ascending; groups may be empty, and rows from the last
    end on give zeros. Returns [M, N] in x's dtype; sums are taken in fp32 (float64 for float64).

    Differentiable, once, in x, lora_A and lora_B. Eager only: the host reads `ends`. Raises
    TypeError or ValueError, naming the argument, for what does not fit, and for a weight that
    requires grad.
    """
    _check_arguments(x, weight, lora_A, lora_B, ends)
    arguments = (x, weight, lora_A, lora_B, float(scaling), ends)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, lora_A, lora_B)):
        y: Tensor = _LoraGroupedLinear.apply(*arguments)
        return y
    return _forward(*arguments)[0]


def _check_arguments(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, ends: list[int]
) -> None:
    for name, tensor, dims in (
        ("x", x, 2),
        ("weight", weight, 3),
        ("lora_A", lora_A, 3),
        ("lora_B", lora_B, 3),
    ):
        _check.check_float(name, tensor)
        if tensor.dim() != dims:
            raise ValueError(f"{name} must have {dims} dimensions, got {list(tensor.shape)}")
        _check.check_device(name, tensor, x)
    g, n, k = weight.shape
    _check.check_x(x, k)
    r = lora_A.shape[1]
    if lora_A.shape != (g, r, k) or r == 0:
        raise ValueError(f"lora_A must have shape [{g}, r, {k}], r > 0: got {list(lora_A.shape)}")
    _check.check_shape("lora_B", lora_B, (g, n, r))
    if torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError("weight requires grad, but it is treated as frozen: detach it")
    ordered = all(a <= b for a, b in zip([0, *ends], [*ends, x.shape[0]], strict=True))
    if len(ends) != g or not ordered:
        raise ValueError(f"ends must be {g} ascending numbers up to {x.shape[0]}, got {ends}")


# --- implementations ------------------------------------------------------------------------------


def _by_groups(
    run: Any,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    ends: list[int],
) -> tuple[Tensor, Tensor]:
    lora_B = lora_B.contiguous()  # PEFT's has a group in every column
    y = _cpu.empty(x.shape[0], weight.shape[1], dtype=x.dtype)
    s = _cpu.empty(x.shape[0], lora_A.shape[1], dtype=torch.float32)
    for g, start, end in groups(ends):
        rows = x[start:end]
        y[start:end], s[start:end] = run(
            rows, weight[g], lora_A[g], lora_B[g], scaling, None, None, 0.0, None, False
        )
    last = ends[-1] if ends else 0
    y[last:], s[last:] = 0, 0
    return y, s


def _backward_by_groups(
    run: Any,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    scaling: float,
    ends: list[int],
    *needs: bool,
) -> Grads:
    lora_B = lora_B.contiguous()
    grads = [
        like.new_zeros(like.shape) if need else None
        for like, need in zip((x, lora_A, lora_B), needs, strict=True)
    ]
    for g, start, end in groups(ends):
        rows = slice(start, end)
        factors = (weight[g], lora_A[g], lora_B[g], s[rows], scaling, 0.0, None)
        parts = run(dy[rows], x[rows], *factors, *needs)
        group = slice(g, g + 1)
        for grad, part, place in zip(grads, parts, (rows, group, group), strict=True):
            if grad is not None:
                grad[place] = part
    return grads[0], grads[1], grads[2]


OP = Op(
    "lora_grouped_linear",
    Impl("cpu", partial(_by_groups, CPU_FORWARD.run), CPU_FORWARD.supports, 10),
    Impl("reference", reference.lora_grouped_linear, lambda case: None, 0),
)
OP_BACKWARD = Op(
    "lora_grouped_linear_backward",
    Impl("cpu", partial(_backward_by_groups, CPU_BACKWARD.run), CPU_BACKWARD.supports, 10),
    Impl("reference", reference.lora_grouped_linear_backward, lambda case: None, 0),
)


def _forward(x: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    run = OP.run(x.device.type, x.dtype, weight.dtype)
    result: tuple[Tensor, Tensor] = run(as_rows(x, x.shape[1]), weight, *arguments)
    return result


class _LoraGroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        ends: list[int],
    ) -> Tensor:
        y, s = _forward(x, weight, lora_A, lora_B, scaling, ends)
        ctx.save_for_backward(x, weight, lora_A, lora_B, s)
        ctx.scaling, ctx.ends = scaling, ends
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, s = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        run = OP_BACKWARD.run(dy.device.type, dy.dtype, weight.dtype)
        dx, dA, dB = run(
            as_rows(dy, dy.shape[1]),
            as_rows(x, x.shape[1]),
            weight,
            lora_A,
            lora_B,
            s,
            ctx.scaling,
            ctx.ends,
            *needs,
        )
        return dx, None, dA, dB, None, None
