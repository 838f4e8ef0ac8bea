"""The activation of a gated MLP and its gradients, in plain PyTorch.

    y = f(gate) up
    dgate = dy up f'(gate)
    dup = dy f(gate)

f is silu(z) = z s(z), s the logistic function (SwiGLU); gelu, by erf, or gelu_new, its
approximation by tanh (GEGLU). Sums and products in fp32 (float64 for float64), rounded once.
Shazeer 2020 (arXiv:2002.05202).
"""

from __future__ import annotations

import torch

from fusetune.reference import bottleneck
from fusetune.reference.linear_4bit import accumulate_dtype

Tensor = torch.Tensor

# Name: (f, f').
ACTIVATIONS = {name: bottleneck.ACTIVATIONS[name] for name in ("silu", "gelu", "gelu_new")}


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """gate, up [M, N] -> y [M, N] in their dtype."""
    acc = accumulate_dtype(gate.dtype)
    f, _ = ACTIVATIONS[activation]
    return (f(gate.to(acc)) * up.to(acc)).to(gate.dtype)


def glu_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    out: tuple[Tensor | None, Tensor | None],
) -> None:
    """Writes dgate and dup [M, N] to `out`, None where not needed; they may be gate and up."""
    acc = accumulate_dtype(gate.dtype)
    f, derivative = ACTIVATIONS[activation]
    dy, z, other = dy.to(acc), gate.to(acc), up.to(acc)
    gradients = (dy * other * derivative(z), dy * f(z))
    for to, gradient in zip(out, gradients, strict=True):
        if to is not None:
            to.copy_(gradient)
