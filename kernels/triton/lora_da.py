"""dA = dS^T drop(x), the mask drawn again from its seed.

Tiling: a program keeps COLS columns of dA, transposed, in registers and goes over a range of rows,
ROWS at a time. Where K alone does not fill the card the rows are cut into ranges, whose shares a
second launch adds in their order.

Bytes, for x of o bytes an element: M K o and, with P ranges, 8 P r K; dS is read by K / COLS
programs and comes from the cache. Dropout adds nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusetune._triton._tile import (
    dot_wide,
    keep_mask,
    rank_block,
    signed,
    splits,
    sum_parts,
)


@triton.jit
def _da(
    x,
    ds,
    seed,
    out,
    M,
    K,
    r,
    stride_x,
    steps,
    threshold,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANKS: tl.constexpr,
):
    first_col = tl.program_id(0) * COLS
    col, rank = first_col + tl.arange(0, COLS), tl.arange(0, RANKS)
    col_valid, rank_valid = col < K, rank < r
    first = tl.program_id(1) * steps * ROWS
    acc = tl.zeros((COLS, RANKS), tl.float32)
    if DROPOUT:
        key = tl.load(seed)
    for start in range(first, tl.minimum(first + steps * ROWS, M), ROWS):
        row = tl.cast(start, tl.int64) + tl.arange(0, ROWS)
        row_valid = row < M
        tile = tl.load(
            x + row[:, None] * stride_x + col[None, :],
            mask=row_valid[:, None] & col_valid[None, :],
            other=0.0,
        )
        if DROPOUT:
            kept = keep_mask(key, row, first_col, K, threshold, COLS, ALIGNED)
            tile = tl.where(kept, tile, 0.0)
        narrow = tl.load(
            ds + row[:, None] * r + rank[None, :],
            mask=row_valid[:, None] & rank_valid[None, :],
            other=0.0,
        )
        acc = dot_wide(tl.trans(tile), narrow, acc, TERMS)
    out += tl.program_id(1).to(tl.int64) * r * K
    at = rank.to(tl.int64)[None, :] * K + col[:, None]
    tl.store(out + at, acc, mask=col_valid[:, None] & rank_valid[None, :])


def _tiles(x: torch.dtype, ranks: int, quads: bool | None, terms: int) -> tuple[int, int, int, int]:
    """(ROWS, COLS, warps, stages). quads: of a dropout, whether a counter serves four elements."""
    if x == torch.float32:
        return (32, 32, 4, 2) if ranks <= 64 else (16, 32, 8, 2)
    if terms == 0:  # FMA
        return 32 if quads is not False else 16, max(32, 2048 // ranks), 4 if ranks <= 64 else 8, 1
    rows = 64 if ranks <= 32 and quads is not False else 32
    return rows, 64, 4 if ranks <= 64 else 8, 3


def launch_lora_da(
    x: torch.Tensor,
    ds: torch.Tensor,
    out: torch.Tensor,
    seed: torch.Tensor | None = None,
    threshold: int = 0,
    factor: float = 1.0,
    *,
    terms: int,
) -> None:
    """out = factor dS^T drop(x), [r, K] in any dtype.

    x: [M, K], rows contiguous, fp32, fp16 or bf16; ds: fp32 [M, r], contiguous. Elements whose word
    (from seed, int64 [1]) is below threshold are dropped. terms: of a dS, see `dot_wide`.
    """
    (m, k), r = x.shape, ds.shape[1]
    if m == 0 or k == 0:
        out.zero_()
        return
    quads = None if seed is None else k % 4 == 0
    rows, cols, warps, stages = _tiles(x.dtype, rank_block(r), quads, terms)
    blocks = triton.cdiv(k, cols)
    parts, steps = splits(blocks, triton.cdiv(m, rows))
    shares = torch.empty(parts, r, k, dtype=torch.float32, device=x.device)
    _da[(blocks, parts)](
        x,
        ds,
        ds if seed is None else seed,
        shares,
        m,
        k,
        r,
        x.stride(0),
        steps,
        signed(threshold),
        DROPOUT=seed is not None,
        ALIGNED=bool(quads),
        TERMS=terms,
        ROWS=rows,
        COLS=cols,
        RANKS=rank_block(r),
        num_warps=warps,
        enable_fp_fusion=True,
        num_stages=stages,
    )
    sum_parts(shares, out, factor)
