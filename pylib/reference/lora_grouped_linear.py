"""One LoRA linear layer for each group of rows, in plain PyTorch: `reference/lora_linear.py` by
groups.

The rows of x are sorted by group (a mixture's tokens by expert, Shazeer et al. 2017,
arXiv:1701.06538); ends[g] is one past the last row of group g. Rows from ends[-1] on give zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fusetune.reference import lora_linear as one_group

Tensor = torch.Tensor


def groups(ends: list[int]) -> Iterator[tuple[int, int, int]]:
    """(group, first row, one past the last) of the groups that have rows."""
    start = 0
    for group, end in enumerate(ends):
        if end > start:
            yield group, start, end
        start = end


def lora_grouped_linear(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, ends: list[int]
) -> tuple[Tensor, Tensor]:
    """x [M, K], weight [G, N, K], lora_A [G, r, K], lora_B [G, N, r] -> (y [M, N], s [M, r])."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.new_zeros(x.shape[0], weight.shape[1])
    s = x.new_zeros(x.shape[0], lora_A.shape[1], dtype=acc)
    for g, start, end in groups(ends):
        y[start:end], s[start:end] = one_group.lora_linear(
            x[start:end], weight[g], lora_A[g], lora_B[g], scaling, None, None, 0.0, None
        )
    return y, s


def lora_grouped_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    scaling: float,
    ends: list[int],
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB), zeros for groups without rows; None where not needed."""
    needs = (need_dx, need_dA, need_dB)
    grads = tuple(
        torch.zeros_like(like) if need else None
        for like, need in zip((x, lora_A, lora_B), needs, strict=True)
    )
    for g, start, end in groups(ends):
        parts = one_group.lora_linear_backward(
            dy[start:end],
            x[start:end],
            weight[g],
            lora_A[g],
            lora_B[g],
            s[start:end],
            scaling,
            0.0,
            None,
            *needs,
        )
        places = (slice(start, end), slice(g, g + 1), slice(g, g + 1))
        for grad, part, place in zip(grads, parts, places, strict=True):
            if grad is not None and part is not None:
                grad[place] = part
    return grads[0], grads[1], grads[2]
