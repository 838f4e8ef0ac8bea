"""y = x W^T + bias with a dense W, in plain PyTorch."""

from __future__ import annotations

import torch

from fusetune.reference.linear_4bit import accumulate_dtype


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K], weight [N, K], bias [N] -> y [M, N] in x's dtype."""
    acc = accumulate_dtype(x.dtype)
    y = x.to(acc) @ weight.to(acc).T
    if bias is not None:
        y += bias.to(acc)
    return y.to(x.dtype)


def linear_dx(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dy [M, N], weight [N, K] -> dx [M, K] = dy W in dy's dtype."""
    acc = accumulate_dtype(dy.dtype)
    return (dy.to(acc) @ weight.to(acc)).to(dy.dtype)
