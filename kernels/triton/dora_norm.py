"""The norms of the rows of W + scaling B A, in one pass over W; also, merged weights.

The kernel is `_dequantize_rows` of dequantize_4bit.py: a program decodes whole rows, adds
scaling B A in fp32 and sums the squares; the sum is written where it is asked for, rounded once.

Bytes: those of W, packed or dense, N K o of a merged weight, 4 N of norms; A is read by N / 16
programs and comes from the cache.
"""

from __future__ import annotations

import torch

from fusetune._triton.dequantize_4bit import Packed, launch_rows


def launch_dora_norm(
    weight: Packed | torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    norm: torch.Tensor,
    merged: torch.Tensor | None = None,
    arch: int = 80,
) -> None:
    """norm: fp32 [N]. merged: [N, K], rows contiguous, or None.

    weight: dense, rows contiguous, or 4-bit with K a multiple of 8; lora_A [r, K] and lora_B
    [N, r] contiguous. arch: the GPU's, as 80 for sm_80.
    """
    (n, r), k = lora_B.shape, lora_A.shape[1]
    assert lora_A.shape[0] == r
    launch_rows(
        weight,
        n,
        k,
        lora_A=lora_A,
        lora_B=lora_B,
        scaling=scaling,
        out=merged,
        norm=norm,
        arch=arch,
    )
