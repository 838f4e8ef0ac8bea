"""Dropout by counter, on its own: what is kept of x, and x less that times the factor.

Tiling: a program takes a tile [ROWS, COLS] of the matrix and draws its mask in registers.

Bytes, of o each: M K read, M K or 2 M K written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusetune._triton._tile import keep_mask, signed

_ROWS, _COLS, _WARPS = 4, 512, 4


@triton.jit
def _dropout(
    x,
    kept,
    rest,
    seed,
    M,
    K,
    stride_x,
    threshold,
    factor,
    REST: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLS
    col = first + tl.arange(0, COLS)
    inside = (row < M)[:, None] & (col < K)[None, :]
    values = tl.load(x + row[:, None] * stride_x + col[None, :], mask=inside, other=0.0)
    keep = keep_mask(tl.load(seed), row, first, K, threshold, COLS, ALIGNED)
    values_kept = tl.where(keep, values, 0.0)
    target = row[:, None] * K + col[None, :]
    tl.store(kept + target, values_kept, mask=inside)
    if REST:
        left = values.to(tl.float32) - factor * values_kept.to(tl.float32)
        tl.store(rest + target, left.to(rest.dtype.element_ty), mask=inside)


def launch_dropout(
    x: torch.Tensor,
    kept: torch.Tensor,
    seed: torch.Tensor,
    threshold: int,
    factor: float,
    rest: torch.Tensor | None = None,
) -> None:
    """kept = x where the mask keeps it, else 0; rest = x - factor kept, rounded once.

    x: [M, K], rows contiguous; kept, rest: [M, K], contiguous, in x's dtype; seed: int64 [1].
    """
    m, k = x.shape
    _dropout[(triton.cdiv(m, _ROWS), triton.cdiv(k, _COLS))](
        x,
        kept,
        kept if rest is None else rest,
        seed,
        m,
        k,
        x.stride(0),
        signed(threshold),
        factor,
        REST=rest is not None,
        ALIGNED=k % 4 == 0,
        ROWS=_ROWS,
        COLS=_COLS,
        num_warps=_WARPS,
        enable_fp_fusion=True,
    )
