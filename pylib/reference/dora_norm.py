"""The row norms that DoRA divides by (Liu et al. 2024, arXiv:2402.09353, equation 5).

    norm_i = || W_i + scaling (B A)_i ||_2

PEFT's `DoraLinearLayer.get_weight_norm` computes the same, and takes no gradient through it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fusetune.reference.linear_4bit import accumulate_dtype
from fusetune.reference.merge_lora import merged

if TYPE_CHECKING:
    from fusetune.quantized_weight import QuantizedWeight


def dora_norm(
    weight: torch.Tensor | QuantizedWeight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """The norms [N], fp32; float64 where an adapter is float64."""
    acc = accumulate_dtype(torch.promote_types(lora_A.dtype, lora_B.dtype))
    return merged(weight, lora_A, lora_B, scaling, acc).norm(dim=1)
