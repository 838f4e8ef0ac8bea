"""Look-up of embeddings with a LoRA adapter, and its gradients, in plain PyTorch.

    h = A[:, ids]^T                                      [M, r]
    y = scale (W[ids] + scaling h B^T)                   [M, H]
    dh = scale scaling dy B       dB = scale scaling dy^T h       dA[:, ids] += dh^T

Hu et al. 2021 (arXiv:2106.09685), for embeddings as in loralib and PEFT: A holds a column for each
token, and there is no dropout. `scale` is what some models multiply their embeddings by.
"""

from __future__ import annotations

import torch

from fusetune.reference.linear_4bit import accumulate_dtype

Tensor = torch.Tensor


def lora_embedding(
    ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, scale: float
) -> tuple[Tensor, Tensor]:
    """ids [M], weight [V, H], lora_A [r, V], lora_B [H, r] -> (y [M, H] as weight, h [M, r])."""
    acc = accumulate_dtype(weight.dtype)
    h = lora_A.t()[ids].to(acc)
    y = weight[ids].to(acc) + scaling * (h @ lora_B.to(acc).t())
    return (scale * y).to(weight.dtype), h


def lora_embedding_backward(
    dy: Tensor,
    ids: Tensor,
    h: Tensor,
    lora_B: Tensor,
    vocabulary: int,
    factor: float,
    padding_idx: int,
    need_dA: bool,
    need_dB: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dA [r, V], dB [H, r]) in h's dtype; None where not needed.

    factor: scale times scaling. padding_idx: the token that has no gradient, or -1.
    """
    dy = dy.to(h.dtype)
    dA = dB = None
    if need_dA:
        dh = factor * (dy @ lora_B.to(h.dtype))
        dA = h.new_zeros(h.shape[1], vocabulary).index_add_(1, ids, dh.t())
        if padding_idx >= 0:
            dA[:, padding_idx] = 0
    if need_dB:
        dB = factor * (dy.t() @ h)
    return dA, dB
