"""y = x W^T + bias with a 4-bit W, in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fusetune.reference.dequantize_4bit import dequantize_4bit

if TYPE_CHECKING:
    from fusetune.quantized_weight import QuantizedWeight


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are taken in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear_4bit(
    x: torch.Tensor, w: QuantizedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [M, K], w [N, K], bias [N] -> y [M, N] in x's dtype."""
    acc = accumulate_dtype(x.dtype)
    y = x.to(acc) @ dequantize_4bit(w, acc).T
    if bias is not None:
        y += bias.to(acc)
    return y.to(x.dtype)


def linear_4bit_dx(dy: torch.Tensor, w: QuantizedWeight) -> torch.Tensor:
    """dy [M, N], w [N, K] -> dx [M, K] = dy W in dy's dtype."""
    acc = accumulate_dtype(dy.dtype)
    return (dy.to(acc) @ dequantize_4bit(w, acc)).to(dy.dtype)
