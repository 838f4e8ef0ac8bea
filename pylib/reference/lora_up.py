"""The second half of a LoRA adapter on a convolution, in plain PyTorch.

    y + scaling (B s + bias)          ds = scaling B^T dy          dB = scaling dy s^T

for each place: B is a convolution of kernel 1. Hu et al. 2021 (arXiv:2106.09685), as PEFT's.
"""

from __future__ import annotations

import torch

from fusetune.reference.linear_4bit import accumulate_dtype

Tensor = torch.Tensor


def lora_up(y: Tensor, s: Tensor, lora_B: Tensor, scaling: float, bias: Tensor | None) -> None:
    """y [M, N, L] += scaling (lora_B [N, r] s [M, r, L] + bias [N]), rounded once."""
    acc = accumulate_dtype(y.dtype)
    added = lora_B.to(acc) @ s.to(acc)
    if bias is not None:
        added += bias.to(acc)[:, None]
    y.copy_(y.to(acc) + scaling * added)


def lora_up_backward(
    dy: Tensor, s: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """dy [M, N, L] -> (ds [M, r, L], dB [N, r]), both in fp32, or float64 for a float64 dy."""
    acc = accumulate_dtype(dy.dtype)
    scaled = scaling * dy.to(acc)
    ds = lora_B.to(acc).t() @ scaled
    return ds, torch.einsum("mnl,mrl->nr", scaled, s.to(acc))
