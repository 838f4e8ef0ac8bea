"""s = drop(x) A^T, for one to four A's from one read of x.

Tiling: a program multiplies ROWS rows of x by a range of K, COLS columns at a time, with all of the
A's; where M is small K is cut into parts, which a second launch adds in their order. The mask of
each A is drawn from its seed in registers, one Philox counter for four elements.

Bytes, for x of o bytes an element: M K o of x, M r 4 of s and, with P parts, 2 P M r 4 more; every
A is read by M / ROWS programs and comes from the cache. Dropout adds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fusetune._triton._adapters import record, rows_of_x
from fusetune._triton._tile import dot_wide, keep_mask, rank_block, signed, splits, sum_parts, terms

MOST = 4  # A's of one launch


@triton.jit
def _step(
    acc,
    x,
    a,
    key,
    r,
    row,
    k,
    K,
    threshold,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    TERMS: tl.constexpr,
    COLS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """acc + drop(x) A^T for columns k to k + COLS."""
    rank, col = tl.arange(0, RANKS), k + tl.arange(0, COLS)
    part = tl.load(
        a + rank[None, :] * K + col[:, None],
        mask=(rank < r)[None, :] & (col < K)[:, None],
        other=0.0,
    )
    if DROPOUT:
        x = tl.where(keep_mask(key, row, k, K, threshold, COLS, ALIGNED), x, 0.0)
    return dot_wide(x, part, acc, TERMS)


@triton.jit
def _shrink(
    x,
    a0,
    a1,
    a2,
    a3,
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
    factor,
    block,
    size,
    SEVERAL: tl.constexpr,
    COUNT: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_valid = row < M
    at = row
    col = tl.arange(0, COLS)
    first = tl.program_id(1) * steps * COLS
    end = K
    if SEVERAL:  # each program is of one of many A's, which lie together
        i = tl.program_id(2)
        r0, before, count, served_from, start, threshold, factor, _ = record(records, i)
        row_valid = at < count * block
        row = rows_of_x(served, served_from, at, row_valid, block)
        a0 += before * K
        seed0 += i
        out += tl.program_id(1).to(tl.int64) * size + start * block
        end = tl.where(tl.program_id(0) * ROWS < count * block, K, first)
    key0, key1, key2, key3 = 0, 0, 0, 0
    if DROPOUT:
        key0 = tl.load(seed0)
        key1 = tl.load(seed1)
        key2 = tl.load(seed2)
        key3 = tl.load(seed3)
    acc0 = tl.zeros((ROWS, RANKS), tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    for k in range(first, tl.minimum(first + steps * COLS, end), COLS):
        xt = tl.load(
            x + row[:, None] * stride_x + (k + col)[None, :],
            mask=row_valid[:, None] & (k + col < K)[None, :],
            other=0.0,
        )
        acc0 = _step(
            acc0, xt, a0, key0, r0, row, k, K, threshold, DROPOUT, ALIGNED, TERMS, COLS, RANKS
        )
        if COUNT > 1:
            acc1 = _step(
                acc1, xt, a1, key1, r1, row, k, K, threshold, DROPOUT, ALIGNED, TERMS, COLS, RANKS
            )
        if COUNT > 2:
            acc2 = _step(
                acc2, xt, a2, key2, r2, row, k, K, threshold, DROPOUT, ALIGNED, TERMS, COLS, RANKS
            )
        if COUNT > 3:
            acc3 = _step(
                acc3, xt, a3, key3, r3, row, k, K, threshold, DROPOUT, ALIGNED, TERMS, COLS, RANKS
            )
    # Part, then A, then row.
    if not SEVERAL:
        out += tl.program_id(1).to(tl.int64) * M * (r0 + r1 + r2 + r3)
    _store(out, acc0 * factor, at, row_valid, r0, RANKS)
    if COUNT > 1:
        out += M.to(tl.int64) * r0
        _store(out, acc1 * factor, at, row_valid, r1, RANKS)
    if COUNT > 2:
        out += M.to(tl.int64) * r1
        _store(out, acc2 * factor, at, row_valid, r2, RANKS)
    if COUNT > 3:
        out += M.to(tl.int64) * r2
        _store(out, acc3 * factor, at, row_valid, r3, RANKS)


@triton.jit
def _store(out, values, at, row_valid, r, RANKS: tl.constexpr):
    rank = tl.arange(0, RANKS)
    mask = row_valid[:, None] & (rank < r)[None, :]
    tl.store(out + at[:, None] * r + rank[None, :], values, mask=mask)


def _tiles(x: torch.dtype, count: int, ranks: int, terms: int, quads: bool | None) -> list[int]:
    """[ROWS, COLS, warps, stages] for `count` A's of `ranks` each.

    quads: of a dropout, whether one counter serves four elements. What a warp holds of an A, and
    the generator's state, decide COLS: no architecture spills registers.
    """
    if x == torch.float32:
        return [32, 32, 4 if ranks * count <= 64 else 8, 2]
    if terms == 0:  # FMA: as many rows as registers hold the sums of
        wide = ranks * triton.next_power_of_2(count)
        cols = 32 if quads is None and wide <= 32 else 16
        return [max(32, 2048 // wide), cols, 4 if wide <= 128 else 8, 1]
    most = 128 if quads is None else 64 if quads else 32 if count == 1 else 16
    fits = 4096 // (ranks * terms * (2 if x == torch.float16 else 1))
    cols = min(most, max(32, 1 << fits.bit_length() - 1))
    few = ranks * count <= (128 if quads is None and terms == 1 else 32)
    return [64, cols, 4 if few or (count > 1 and ranks <= 16) else 8, 3]


def launch_lora_shrink(
    x: torch.Tensor,
    loras: Sequence[torch.Tensor],
    seeds: Sequence[torch.Tensor] | None = None,
    threshold: int = 0,
    factor: float = 1.0,
    *,
    arch: int = 80,
) -> list[torch.Tensor]:
    """s = factor drop(x) A^T, fp32 [M, r], for every A [r, K] of `loras`.

    x: [M, K], rows contiguous, fp32, fp16 or bf16. A: contiguous, fp32, fp16 or bf16, all of one
    dtype. seeds: int64 [1] for every A; elements whose word is below threshold (32 bits) are
    dropped. arch: 75, 80, ..., the device's compute capability.
    """
    m, k = x.shape
    ranks = [a.shape[0] for a in loras]
    flat = torch.empty(m * sum(ranks), dtype=torch.float32, device=x.device)
    if m and k:
        _launch(x, loras, seeds, threshold, factor, ranks, flat, arch)
    elif m:
        flat.zero_()
    parts = flat.split([m * r for r in ranks])
    return [part.view(m, r) for part, r in zip(parts, ranks, strict=True)]


def _launch(
    x: torch.Tensor,
    loras: Sequence[torch.Tensor],
    seeds: Sequence[torch.Tensor] | None,
    threshold: int,
    factor: float,
    ranks: list[int],
    flat: torch.Tensor,
    arch: int,
) -> None:
    (m, k), count = x.shape, len(loras)
    block = rank_block(max(ranks))
    n_terms = terms(loras[0], x.dtype, arch)
    quads = None if seeds is None else k % 4 == 0
    rows, cols, warps, stages = _tiles(x.dtype, count, block, n_terms, quads)
    blocks, steps = triton.cdiv(m, rows), triton.cdiv(k, cols)
    parts, steps = splits(blocks, steps)
    out = flat
    if parts > 1:
        out = torch.empty(parts, flat.numel(), dtype=torch.float32, device=x.device)
    pad = [loras[0]] * (MOST - count)
    _shrink[(blocks, parts)](
        x,
        *loras,
        *pad,
        *(seeds or loras),
        *([seeds[0]] * (MOST - count) if seeds else pad),
        out,
        out,
        out,
        m,
        k,
        *ranks,
        *([0] * (MOST - count)),
        x.stride(0),
        steps,
        signed(threshold),
        factor if parts == 1 else 1.0,
        0,
        0,
        SEVERAL=False,
        COUNT=count,
        DROPOUT=seeds is not None,
        ALIGNED=bool(quads),
        TERMS=n_terms,
        ROWS=rows,
        COLS=cols,
        RANKS=block,
        num_warps=warps,
        enable_fp_fusion=True,
        num_stages=stages,
    )
    if parts > 1:
        sum_parts(out, flat, factor)
