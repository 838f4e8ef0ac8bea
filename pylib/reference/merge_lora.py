"""W + scaling B A: the weight that a layer with LoRA amounts to.

Hu et al. 2021, arXiv:2106.09685, section 4.1.
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


def merge_lora(
    weight: torch.Tensor | QuantizedWeight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The sum [N, K], rounded to `dtype` once; taken in float64 where that or an operand is."""
    operands = [lora_A.dtype, lora_B.dtype, dtype]
    if isinstance(weight, torch.Tensor):
        operands.append(weight.dtype)
    acc = accumulate_dtype(torch.float64 if torch.float64 in operands else dtype)
    return merged(weight, lora_A, lora_B, scaling, acc).to(dtype)
