"""Cross-entropy over a vocabulary and its gradient, in plain PyTorch, a block of rows at a time.

    lse = log sum_v exp(x_v)
    loss = (1 - eps) (lse - x_target) + eps (lse - mean_v x_v)          0 for an ignored row
    dx_v = dloss (exp(x_v - lse) - (1 - eps) [v = target] - eps / V)    0 for an ignored row

eps is the label smoothing. No copy of the logits as a whole is made: what is kept between the two
is lse. Source: torch.nn.functional.cross_entropy.
"""

from __future__ import annotations

import torch

from fusetune.reference.linear_4bit import accumulate_dtype

_BLOCK_ELEMENTS = 1 << 20  # of logits worked on at a time: 4 MB of fp32


def _blocks(logits: torch.Tensor) -> list[slice]:
    rows, vocabulary = logits.shape
    step = max(1, _BLOCK_ELEMENTS // max(1, vocabulary))
    return [slice(i, i + step) for i in range(0, rows, step)]


def cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [M, V], target int64 [M] -> (loss [M], lse [M]), fp32 (float64 for float64)."""
    acc = accumulate_dtype(logits.dtype)
    loss = torch.empty(len(logits), dtype=acc, device=logits.device)
    lse = torch.empty_like(loss)
    for rows in _blocks(logits):
        x = logits[rows].to(acc)
        kept = target[rows] != ignore_index
        index = torch.where(kept, target[rows], 0)
        lse[rows] = x.logsumexp(1)
        at_target = x.gather(1, index[:, None]).squeeze(1)
        picked = torch.lerp(at_target, x.mean(1), label_smoothing) if label_smoothing else at_target
        loss[rows] = torch.where(kept, lse[rows] - picked, 0)
    return loss, lse


def cross_entropy_backward(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    in_place: bool = False,
) -> torch.Tensor:
    """dloss [M] and what `cross_entropy` took and gave -> dlogits [M, V] in the logits' dtype.

    in_place: the logits' memory is written over.
    """
    acc = accumulate_dtype(logits.dtype)
    dlogits = logits if in_place else torch.empty_like(logits)
    for rows in _blocks(logits):
        kept = target[rows] != ignore_index
        index = torch.where(kept, target[rows], 0)[:, None]
        scale = torch.where(kept, dloss[rows], 0).to(acc)[:, None]
        dx = (logits[rows].to(acc) - lse[rows, None]).exp_()
        if label_smoothing:
            dx -= label_smoothing / logits.shape[1]
        dx.scatter_add_(1, index, torch.full_like(scale, label_smoothing - 1))
        # An ignored row is zero whatever it holds, also where it is not finite.
        dlogits[rows] = torch.where(kept[:, None], dx.mul_(scale), 0)
    return dlogits
