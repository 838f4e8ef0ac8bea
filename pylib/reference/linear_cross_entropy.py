"""The loss of a linear layer's outputs as logits, and its gradient, in plain PyTorch.

    logits = x W^T + bias                                       [M, V]
    loss = cross_entropy(logits, target)                        [M]
    dx_i = (d loss_i / d logits_i) W                            [M, K], of each row's own loss

Source: torch.nn.functional.linear and cross_entropy.
"""

from __future__ import annotations

import torch

from fusetune.reference.cross_entropy import cross_entropy, cross_entropy_backward
from fusetune.reference.linear import linear, linear_dx


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    want_dx: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K], weight [V, K], bias [V], target int64 [M] -> (loss [M], dx [M, K] or [0, K]).

    loss is fp32 (float64 for float64), dx in x's dtype.
    """
    logits = linear(x, weight, bias)
    loss, lse = cross_entropy(logits, target, ignore_index, label_smoothing)
    if not want_dx:
        return loss, x.new_empty(0, x.shape[1])
    plain = (target, lse, ignore_index, label_smoothing)
    dlogits = cross_entropy_backward(torch.ones_like(loss), logits, *plain, in_place=True)
    return loss, linear_dx(dlogits, weight)
