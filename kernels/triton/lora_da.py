"""dA = dS^T drop(x) for one to four A's from one read of x, each mask drawn again from its seed.

Tiling: a program keeps COLS columns of every dA, transposed, in registers and goes over a range of
rows, ROWS at a time. Where K alone does not fill the card the rows are cut into ranges; a second
launch for each dA adds their shares in their order.

Bytes, for x of o bytes an element: M K o of x and, with P ranges, 8 P r K of every dA; dS is read
by K / COLS programs and comes from the cache. Dropout adds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fusetune._triton._adapters import record, rows_of_x
from fusetune._triton._tile import (
    dot_wide,
    keep_mask,
    rank_block,
    signed,
    splits,
    sum_parts,
)

MOST = 4  # A's of one launch


@triton.jit
def _step(
    acc,
    x,
    ds,
    key,
    r,
    at,
    row,
    row_valid,
    first_col,
    K,
    threshold,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    TERMS: tl.constexpr,
    COLS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """acc + drop(x)^T dS for ROWS rows: those of dS are at, those of x `row`."""
    rank = tl.arange(0, RANKS)
    if DROPOUT:
        x = tl.where(keep_mask(key, row, first_col, K, threshold, COLS, ALIGNED), x, 0.0)
    narrow = tl.load(
        ds + at[:, None] * r + rank[None, :],
        mask=row_valid[:, None] & (rank < r)[None, :],
        other=0.0,
    )
    return dot_wide(tl.trans(x), narrow, acc, TERMS)


@triton.jit
def _da(
    x,
    ds0,
    ds1,
    ds2,
    ds3,
    seed0,
    seed1,
    seed2,
    seed3,
    records,
    served,
    out,
    M,
    K,
    r0,
    r1,
    r2,
    r3,
    stride_x,
    steps,
    threshold,
    block,
    ranks,
    SEVERAL: tl.constexpr,
    COUNT: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANKS: tl.constexpr,
):
    first_col = tl.program_id(0) * COLS
    col = first_col + tl.arange(0, COLS)
    col_valid = col < K
    served_from = 0
    if SEVERAL:  # each program is of one of many dA's: M and r0 are its own
        i = tl.program_id(2)
        r0, before, count, served_from, start, threshold, factor, _ = record(records, i)
        M = count * block
        steps = tl.cdiv(tl.cdiv(M, ROWS), tl.num_programs(1))
        ds0 += start * block
        seed0 += i
    first = tl.program_id(1) * steps * ROWS
    key0, key1, key2, key3 = 0, 0, 0, 0
    if DROPOUT:
        key0 = tl.load(seed0)
        key1 = tl.load(seed1)
        key2 = tl.load(seed2)
        key3 = tl.load(seed3)
    acc0 = tl.zeros((COLS, RANKS), tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    for begin in range(first, tl.minimum(first + steps * ROWS, M), ROWS):
        at = tl.cast(begin, tl.int64) + tl.arange(0, ROWS)
        valid = at < M
        row = rows_of_x(served, served_from, at, valid, block) if SEVERAL else at
        tile = tl.load(
            x + row[:, None] * stride_x + col[None, :],
            mask=valid[:, None] & col_valid[None, :],
            other=0.0,
        )
        acc0 = _step(
            acc0, tile, ds0, key0, r0, at, row, valid, first_col, K, threshold,
            DROPOUT, ALIGNED, TERMS, COLS, RANKS,
        )  # fmt: skip
        if COUNT > 1:
            acc1 = _step(
                acc1, tile, ds1, key1, r1, at, row, valid, first_col, K, threshold,
                DROPOUT, ALIGNED, TERMS, COLS, RANKS,
            )  # fmt: skip
        if COUNT > 2:
            acc2 = _step(
                acc2, tile, ds2, key2, r2, at, row, valid, first_col, K, threshold,
                DROPOUT, ALIGNED, TERMS, COLS, RANKS,
            )  # fmt: skip
        if COUNT > 3:
            acc3 = _step(
                acc3, tile, ds3, key3, r3, at, row, valid, first_col, K, threshold,
                DROPOUT, ALIGNED, TERMS, COLS, RANKS,
            )  # fmt: skip
    # A, then part: each dA's shares lie together.
    part, parts = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    if SEVERAL:  # part, then A: one launch adds the shares of all
        acc0 *= factor
        out += (part * ranks + before) * K
    else:
        out += part * r0 * K
    _store(out, acc0, col, col_valid, r0, K, RANKS)
    if COUNT > 1:
        out += (parts - part) * r0 * K
        _store(out + part * r1 * K, acc1, col, col_valid, r1, K, RANKS)
    if COUNT > 2:
        out += parts * r1 * K
        _store(out + part * r2 * K, acc2, col, col_valid, r2, K, RANKS)
    if COUNT > 3:
        out += parts * r2 * K
        _store(out + part * r3 * K, acc3, col, col_valid, r3, K, RANKS)


@triton.jit
def _store(out, values, col, col_valid, r, K, RANKS: tl.constexpr):
    rank = tl.arange(0, RANKS)
    at = rank.to(tl.int64)[None, :] * K + col[:, None]
    tl.store(out + at, values, mask=col_valid[:, None] & (rank < r)[None, :])


def _tiles(
    x: torch.dtype, ranks: int, quads: bool | None, terms: int, count: int
) -> tuple[int, int, int, int]:
    """(ROWS, COLS, warps, stages) for `count` A's of `ranks` each.

    quads: of a dropout, whether a counter serves four elements.
    """
    wide = ranks * count
    if x == torch.float32:
        return (32, 32, 4, 2) if wide <= 64 else (16, 32, 8, 2)
    if terms == 0:  # FMA
        cols = max(32, 2048 // (ranks * triton.next_power_of_2(count)))
        return 32 if quads is not False else 16, cols, 4 if wide <= 64 else 8, 1
    if count == 1:
        return 64 if ranks <= 32 and quads is not False else 32, 64, 4 if ranks <= 64 else 8, 3
    # Of several, masks and the parts of each dS are held at once.
    masked = quads is not None
    cols = 64 if wide * terms <= (48 if masked else 128) else 32
    rows = 64 if ranks <= 32 and not masked else 16 if masked and wide > 128 else 32
    return rows, cols, 8 if masked or wide > 32 else 4, 3


def launch_lora_da(
    x: torch.Tensor,
    ds: Sequence[torch.Tensor],
    outs: Sequence[torch.Tensor],
    seeds: Sequence[torch.Tensor] | None = None,
    threshold: int = 0,
    factor: float = 1.0,
    *,
    terms: int,
) -> None:
    """out = factor dS^T drop(x), [r, K] in any dtype, for every dS of `ds` and its out.

    x: [M, K], rows contiguous, fp32, fp16 or bf16; dS: fp32 [M, r], contiguous. seeds: int64 [1]
    for every dS; elements whose word is below threshold are dropped. terms: of a dS, see
    `dot_wide`.
    """
    (m, k), ranks, count = x.shape, [one.shape[1] for one in ds], len(ds)
    if m == 0 or k == 0:
        for out in outs:
            out.zero_()
        return
    quads = None if seeds is None else k % 4 == 0
    block = rank_block(max(ranks))
    rows, cols, warps, stages = _tiles(x.dtype, block, quads, terms, count)
    blocks = triton.cdiv(k, cols)
    parts, steps = splits(blocks, triton.cdiv(m, rows))
    shares = torch.empty(parts * sum(ranks) * k, dtype=torch.float32, device=x.device)
    pad = [ds[0]] * (MOST - count)
    _da[(blocks, parts)](
        x,
        *ds,
        *pad,
        *(seeds or ds),
        *([seeds[0]] * (MOST - count) if seeds else pad),
        x,
        x,
        shares,
        m,
        k,
        *ranks,
        *([0] * (MOST - count)),
        x.stride(0),
        steps,
        signed(threshold),
        0,
        0,
        SEVERAL=False,
        COUNT=count,
        DROPOUT=seeds is not None,
        ALIGNED=bool(quads),
        TERMS=terms,
        ROWS=rows,
        COLS=cols,
        RANKS=block,
        num_warps=warps,
        enable_fp_fusion=True,
        num_stages=stages,
    )
    for one, out in zip(shares.split([parts * r * k for r in ranks]), outs, strict=True):
        sum_parts(one.view(parts, -1), out, factor)
