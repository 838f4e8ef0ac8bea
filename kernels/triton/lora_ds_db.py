"""dS = scaling dY B and dB = scaling dY^T s from one read of dY.

Tiling: a program keeps COLS columns of dB in registers and goes over a range of the rows of dY,
ROWS at a time: each tile gives its share of dS, and its share of dB. Shares are kept apart, dS by
column block and dB by row range, and added in their order by a second launch: no atomics, always
the same result.

Bytes, for dY of o bytes an element: M N o, and 8 M r for each of N / COLS column blocks, 8 N r for
each row range. COLS is as large as registers allow, row ranges as few as fill the card. B is read
once for each tile, from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusetune._triton._adapters import record, rows_of_x
from fusetune._triton._tile import PROGRAMS, dot_wide, rank_block, splits, sum_parts, terms


@triton.jit
def _ds_db(
    dy,
    lora_B,
    s,
    records,
    served,
    ds,
    db,
    M,
    N,
    r,
    stride_dy,
    steps,
    block,
    size,
    ranks,
    SEVERAL: tl.constexpr,
    TERMS_B: tl.constexpr,
    TERMS_S: tl.constexpr,
    NEED_DB: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANKS: tl.constexpr,
):
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    rank = tl.arange(0, RANKS)
    served_from = 0
    if SEVERAL:  # each program is of one of many B's, which lie together: M and r are its own
        r, before, count, served_from, start, _, _, scaling = record(records, tl.program_id(2))
        M = count * block
        steps = tl.cdiv(tl.cdiv(M, ROWS), tl.num_programs(1))
        lora_B += before * N
        s += start * block
        ds += tl.program_id(0).to(tl.int64) * size + start * block
    else:
        ds += tl.program_id(0).to(tl.int64) * M * r
    col_valid, rank_valid = col < N, rank < r
    first = tl.program_id(1) * steps * ROWS
    acc = tl.zeros((COLS, RANKS), tl.float32)
    b = tl.load(
        lora_B + col[:, None] * r + rank[None, :],
        mask=col_valid[:, None] & rank_valid[None, :],
        other=0.0,
    )
    last = tl.minimum(first + steps * ROWS, M)
    row = first.to(tl.int64) + tl.arange(0, ROWS)
    row_of_dy = rows_of_x(served, served_from, row, row < last, block) if SEVERAL else row
    after = tl.load(
        dy + row_of_dy[:, None] * stride_dy + col[None, :],
        mask=(row < last)[:, None] & col_valid[None, :],
        other=0.0,
    )
    for _ in range(first, last, ROWS):
        # The next tile is asked for before this one is worked on: what two products read in two
        # ways Triton does not prefetch itself.
        tile, row_valid = after, row < M
        narrow = row_valid[:, None] & rank_valid[None, :]
        at = row[:, None] * r + rank[None, :]
        row += ROWS
        row_of_dy = rows_of_x(served, served_from, row, row < last, block) if SEVERAL else row
        after = tl.load(
            dy + row_of_dy[:, None] * stride_dy + col[None, :],
            mask=(row < last)[:, None] & col_valid[None, :],
            other=0.0,
        )
        share = dot_wide(tile, b, tl.zeros((ROWS, RANKS), tl.float32), TERMS_B)
        if SEVERAL:
            share *= scaling
        tl.store(ds + at, share, mask=narrow)
        if NEED_DB:
            acc = dot_wide(tl.trans(tile), tl.load(s + at, mask=narrow, other=0.0), acc, TERMS_S)
    if NEED_DB:
        if SEVERAL:
            db += (tl.program_id(1).to(tl.int64) * ranks + before) * N
            acc *= scaling
        else:
            db += tl.program_id(1).to(tl.int64) * N * r
        at = col.to(tl.int64)[:, None] * r + rank[None, :]
        tl.store(db + at, acc, mask=col_valid[:, None] & rank_valid[None, :])


def _tiles(dy: torch.dtype, ranks: int, terms: int) -> tuple[int, int, int]:
    """(ROWS, COLS, warps): dB's columns fill the registers of a program, whatever the rank."""
    if dy == torch.float32:
        return (32, 32, 4) if ranks <= 64 else (16, 32, 8)
    if terms == 0:  # FMA
        return (32, 4096 // ranks, 8) if ranks <= 64 else (16, 32, 8)
    wide = (2 if dy == torch.bfloat16 else 4) if terms > 1 else 1 if dy == torch.bfloat16 else 2
    cols = min(512, max(32, 8192 // (ranks * wide)))
    return 32, cols, 8 if cols >= 256 or ranks >= 64 else 4


def launch_lora_ds_db(
    dy: torch.Tensor,
    lora_B: torch.Tensor,
    s: torch.Tensor,
    scaling: float,
    ds: torch.Tensor,
    db: torch.Tensor | None,
    *,
    arch: int = 80,
) -> None:
    """ds, fp32 [M, r], and db, [N, r] in any dtype; None: not needed.

    dy: [M, N], rows contiguous, fp32, fp16 or bf16; lora_B: [N, r], contiguous, any of these; s:
    fp32 [M, r], contiguous. arch: 75, 80, ..., the device's compute capability.
    """
    (m, n), r = dy.shape, lora_B.shape[1]
    if m == 0 or n == 0:
        ds.zero_()
        if db is not None:
            db.zero_()
        return
    n_terms = terms(lora_B, dy.dtype, arch)
    rows, cols, warps = _tiles(dy.dtype, rank_block(r), n_terms)
    blocks = triton.cdiv(n, cols)
    # Every share is written and read once more. Half as many programs as elsewhere, each with a
    # tile in flight, keep memory busy where a product is of one term and so needs little else.
    programs = PROGRAMS // 2 if n_terms == 1 else PROGRAMS
    parts, steps = splits(blocks, triton.cdiv(m, rows), programs)
    ds_parts = torch.empty(blocks, m, r, dtype=torch.float32, device=dy.device)
    db_parts = ds_parts
    if db is not None:
        db_parts = torch.empty(parts, n, r, dtype=torch.float32, device=dy.device)
    _ds_db[(blocks, parts)](
        dy,
        lora_B,
        s,
        dy,
        dy,
        ds_parts,
        db_parts,
        m,
        n,
        r,
        dy.stride(0),
        steps,
        0,
        0,
        0,
        SEVERAL=False,
        TERMS_B=n_terms,
        TERMS_S=n_terms,  # adapters in 16 bits: s as well
        NEED_DB=db is not None,
        ROWS=rows,
        COLS=cols,
        RANKS=rank_block(r),
        num_warps=warps,
        enable_fp_fusion=True,
        num_stages=1,
    )
    sum_parts(ds_parts, ds, scaling)
    if db is not None:
        sum_parts(db_parts, db, scaling)
