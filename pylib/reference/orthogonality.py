"""How far matrices are from having orthonormal rows or columns, in plain PyTorch.

    mean over i of || P_i P_i^T - I ||_F, with the columns' matrices transposed

AdaLoRA's regulariser: Zhang et al. 2023, arXiv:2303.10512, equation (4), but the norm not squared
and the mean taken, as the authors' code and PEFT have it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusetune.reference.linear_4bit import accumulate_dtype


def orthogonality(rows: Sequence[torch.Tensor], columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """rows [r, K] each, columns [N, r] each -> a scalar in fp32 (float64 for float64)."""
    norms = []
    for matrix in [*rows, *(each.mT for each in columns)]:
        p = matrix.to(accumulate_dtype(matrix.dtype))
        identity = torch.eye(p.shape[0], dtype=p.dtype, device=p.device)
        norms.append(torch.linalg.matrix_norm(p @ p.mT - identity))
    return torch.stack(norms).mean()
