"""The activation of a gated MLP and its gradients, in plain PyTorch.

    y = silu(gate) up           silu(z) = z s(z), s the logistic function
    dgate = dy up s(gate) (1 + gate (1 - s(gate)))
    dup = dy silu(gate)

Sums and products in fp32 (float64 for float64), rounded once. Shazeer 2020 (arXiv:2002.05202).
"""

from __future__ import annotations

import torch

from fusetune.reference.bottleneck import ACTIVATIONS
from fusetune.reference.linear_4bit import accumulate_dtype

Tensor = torch.Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [M, N] -> y [M, N] in their dtype."""
    acc = accumulate_dtype(gate.dtype)
    silu, _ = ACTIVATIONS["silu"]
    return (silu(gate.to(acc)) * up.to(acc)).to(gate.dtype)


def swiglu_backward(
    dy: Tensor, gate: Tensor, up: Tensor, out: tuple[Tensor | None, Tensor | None]
) -> None:
    """Writes dgate and dup [M, N] to `out`, None where not needed; they may be gate and up."""
    acc = accumulate_dtype(gate.dtype)
    silu, derivative = ACTIVATIONS["silu"]
    dy, z, other = dy.to(acc), gate.to(acc), up.to(acc)
    gradients = (dy * other * derivative(z), dy * silu(z))
    for to, gradient in zip(out, gradients, strict=True):
        if to is not None:
            to.copy_(gradient)
