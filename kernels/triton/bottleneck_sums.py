"""The end of a bottleneck adapter's backward pass: shares of the parameters' gradients, summed up.

Every range of rows has left a share: fp32 [2 d H + H + d], dW_d, dW_u, db_u and db_d after another,
each padded to whole blocks.

Tiling: a program has BLOCK elements of one group's gradients and adds the shares of the group's
ranges in their order: no atomics, always the same result.
Bytes, for P ranges and G groups: 8 P d H of shares, 2 G d H elements of dW_d and dW_u.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

_BLOCK = 512


@triton.jit
def _sum_shares(
    shares,
    ranges,
    count,
    d_down,
    d_up,
    d_up_bias,
    d_down_bias,
    H,
    d,
    up_at,
    up_bias_at,
    down_bias_at,
    size,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The shares of every group's ranges, added in their order: four gradients after another."""
    group, begin = tl.program_id(1).to(tl.int64), 0
    if GROUPED:
        begin, count = tl.load(ranges + group), tl.load(ranges + group + 1)
    start = tl.program_id(0) * BLOCK
    i = start + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(begin, count):
        total += tl.load(shares + tl.cast(part, tl.int64) * size + i)
    if start < up_at:
        n = d * H
        out = d_down + group * n + i
        tl.store(out, total.to(d_down.dtype.element_ty), mask=i < n)
    elif start < up_bias_at:
        n, i = d * H, i - up_at
        out = d_up + group * n + i
        tl.store(out, total.to(d_up.dtype.element_ty), mask=i < n)
    elif start < down_bias_at:
        i -= up_bias_at
        tl.store(d_up_bias + group * H + i, total, mask=i < H)
    else:
        i -= down_bias_at
        tl.store(d_down_bias + group * d + i, total, mask=i < d)


class Gradients(NamedTuple):
    dx: torch.Tensor | None
    down_weight: torch.Tensor | None
    down_bias: torch.Tensor | None
    up_weight: torch.Tensor | None
    up_bias: torch.Tensor | None


def empty_gradients(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    up_weight: torch.Tensor,
    need_dx: bool,
    need_parameters: bool,
) -> Gradients:
    """To be written, or zeros where x has no rows; None for what is not needed."""
    new = torch.empty if len(x) else torch.zeros
    return Gradients(
        new(x.shape, dtype=x.dtype, device=x.device) if need_dx else None,
        *(
            new(shape, dtype=dtype, device=x.device) if need_parameters else None
            for shape, dtype in (
                (down_weight.shape, down_weight.dtype),
                (down_weight.shape[:2], torch.float32),
                (up_weight.shape, up_weight.dtype),
                (up_weight.shape[:2], torch.float32),
            )
        ),
    )


def places_of(h: int, d: int) -> tuple[tuple[int, int, int], int]:
    """Where dW_u, db_u and db_d begin in a share, and its size."""
    weight, bias, narrow = (_BLOCK * triton.cdiv(n, _BLOCK) for n in (d * h, h, d))
    return (weight, 2 * weight, 2 * weight + bias), 2 * weight + bias + narrow


def ranges_of(rows: tuple[int, ...], size: int, device: torch.device) -> torch.Tensor:
    """int64 [G + 1]: where the ranges of each group begin among all."""
    counts = torch.tensor([0, *(triton.cdiv(n, size) for n in rows)], dtype=torch.int64)
    return counts.cumsum(0).to(device)


def sum_shares(shares: torch.Tensor, ranges: torch.Tensor | None, grads: Gradients) -> None:
    """Writes the parameters' gradients. shares: [P, size]; ranges: `ranges_of` several groups."""
    assert grads.down_weight is not None
    g, d, h = grads.down_weight.shape
    places, size = places_of(h, d)
    _sum_shares[(size // _BLOCK, g)](
        shares,
        shares if ranges is None else ranges,
        len(shares),
        grads.down_weight,
        grads.up_weight,
        grads.up_bias,
        grads.down_bias,
        h,
        d,
        *places,
        size,
        GROUPED=ranges is not None,
        BLOCK=_BLOCK,
        num_warps=4,
    )
