"""The importance of an adapter's weights by AdaLoRA, in plain PyTorch.

    I = | w dw |
    sensitivity = beta1 sensitivity + (1 - beta1) I
    uncertainty = beta2 uncertainty + (1 - beta2) | I - sensitivity |
    score = mean of sensitivity times uncertainty, over one dimension

Zhang et al. 2023, arXiv:2303.10512, equations (8) to (11).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

Tensors = Sequence[torch.Tensor]


class Given(NamedTuple):
    """Matrices of one shape at each place, the factors of the averages, and what scores are of:
    rows (dim 1) or columns (0). grads None: the averages stay as they are."""

    weights: Tensors
    grads: Tensors | None
    sensitivity: Tensors
    uncertainty: Tensors
    beta1: float
    beta2: float
    dim: int


def importance(given: Given) -> torch.Tensor:
    """The averages change in place -> scores, of all matrices one after the other."""
    weights, grads, _, _, beta1, beta2, dim = given
    scores = []
    for i, (s, u) in enumerate(zip(given.sensitivity, given.uncertainty, strict=True)):
        if grads is not None:
            current = (weights[i] * grads[i]).abs()
            s.copy_(beta1 * s + (1 - beta1) * current)
            u.copy_(beta2 * u + (1 - beta2) * (current - s).abs())
        scores.append((s * u).mean(dim))
    return torch.cat(scores)
