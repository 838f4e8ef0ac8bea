"""The row norms that DoRA divides by (Liu et al. 2024, arXiv:2402.09353, equation 5).

    norm_i = || W_i + scaling (B A)_i ||_2

PEFT's `DoraLinearLayer.get_weight_norm` computes the same, and takes no gradient through it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fusetune.reference.dequantize_4bit import dequantize_4bit
from fusetune.reference.linear_4bit import accumulate_dtype

if TYPE_CHECKING:
    from fusetune.quantized_weight import QuantizedWeight


def merged(
    weight: torch.Tensor | QuantizedWeight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    acc: torch.dtype,
) -> torch.Tensor:
    """W + scaling B A in `acc`. weight [N, K], lora_A [r, K], lora_B [N, r]."""
    dense = weight.to(acc) if isinstance(weight, torch.Tensor) else dequantize_4bit(weight, acc)
    return dense + scaling * (lora_B.to(acc) @ lora_A.to(acc))


def dora_norm(
    weight: torch.Tensor | QuantizedWeight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """The norms [N], fp32; float64 where an adapter is float64."""
    acc = accumulate_dtype(torch.promote_types(lora_A.dtype, lora_B.dtype))
    return merged(weight, lora_A, lora_B, scaling, acc).norm(dim=1)
