"""y = weight x / sqrt(mean(x^2) + eps), in plain PyTorch."""

from __future__ import annotations

import torch

from fusetune.reference.linear_4bit import accumulate_dtype


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, N], weight [N] -> y [M, N] in x's dtype, rstd [M] in the dtype of sums."""
    exact = x.to(accumulate_dtype(x.dtype))
    rstd = torch.rsqrt(exact.square().mean(-1) + eps)
    return (weight.to(exact.dtype) * exact * rstd[:, None]).to(x.dtype), rstd


def rms_norm_dx(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    """dx [M, N] in x's dtype, from dy and x [M, N], weight [N] and the forward pass's rstd [M]."""
    upper, exact = dy.to(rstd.dtype) * weight.to(rstd.dtype), x.to(rstd.dtype)
    along = (upper * exact).mean(-1, keepdim=True) * rstd[:, None].square()
    return ((upper - exact * along) * rstd[:, None]).to(x.dtype)
