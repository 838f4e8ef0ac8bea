"""LoRA linear layers over one x and their gradients, in plain PyTorch.

    y_i = x W_i^T + bias_i + scaling_i (drop_i(x) A_i^T B_i^T + lora_bias_i)
    dx = sum of dy_i W_i + drop_i'(scaling_i dy_i B_i A_i), rounded once

The rest as in lora_linear; each projection drops out x with a mask of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from fusetune.reference import lora_linear as single
from fusetune.reference.linear_4bit import accumulate_dtype

if TYPE_CHECKING:
    from fusetune.quantized_weight import QuantizedWeight

Tensor = torch.Tensor


class Projection(NamedTuple):
    """One of the layers: weight [N, K], lora_A [r, K], lora_B [N, r], biases [N].

    seed: of its dropout, None without one.
    """

    weight: Tensor | QuantizedWeight
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    bias: Tensor | None
    lora_bias: Tensor | None
    dropout_p: float
    seed: Tensor | None


class Need(NamedTuple):
    """Which gradients of a projection are asked for."""

    lora_A: bool
    lora_B: bool


def lora_linear_group(
    x: Tensor, projections: Sequence[Projection]
) -> tuple[list[Tensor], list[Tensor]]:
    """x [M, K] -> (every y [M, N_i] in x's dtype, every s [M, r_i])."""
    results = [single.lora_linear(x, *projection) for projection in projections]
    return [y for y, _ in results], [s for _, s in results]


def lora_linear_group_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    projections: Sequence[Projection],
    s: Sequence[Tensor],
    need_dx: bool,
    needs: Sequence[Need],
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """(dx in x's dtype, (dA, dB) of each projection in their parameter's dtype)."""
    acc = accumulate_dtype(x.dtype)
    total = torch.zeros(x.shape, dtype=acc, device=x.device) if need_dx else None
    grads = []
    for dy, projection, low, need in zip(dys, projections, s, needs, strict=True):
        dx, dA, dB = single.lora_linear_backward(
            dy.to(acc),
            x.to(acc),
            *projection[:3],
            low,
            projection.scaling,
            projection.dropout_p,
            projection.seed,
            need_dx,
            *need,
        )
        if total is not None and dx is not None:
            total += dx
        grads.append((dA, dB))
    return None if total is None else total.to(x.dtype), grads
