"""Rotary position embedding, in plain PyTorch.

RoFormer (Su et al. 2021, arXiv:2104.09864), with the halves of a head as the pairs that are turned
(equation 34 in the order that GPT-NeoX and LLaMA use):

    out = x cos + turned(x) sin     turned(x) = (-x2, x1)

Backward, cos and sin of each half are exchanged as the transpose of that asks.
"""

from __future__ import annotations

import torch

from fusetune.reference.linear_4bit import accumulate_dtype

Tensor = torch.Tensor


def rotary(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    """x [B, H, T, D], cos and sin [1 or B, T, D] -> out like x; transposed: the backward pass."""
    acc = accumulate_dtype(x.dtype)
    exact, c, s = (t.to(acc) for t in (x, cos.unsqueeze(1), sin.unsqueeze(1)))
    first, second = (exact * s if transposed else exact).chunk(2, -1)
    turned = torch.cat([second, -first] if transposed else [-second, first], -1)
    return (exact * c + (turned if transposed else turned * s)).to(x.dtype)
