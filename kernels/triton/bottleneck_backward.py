"""The gradients of a bottleneck adapter: dX and all of its parameters' from one launch.

    dU = drop'(dY)    dZ = (dU W_u) f'(z)    dX = dZ W_d (+ dY)    dW_u = dU^T f(z)    dW_d = dZ^T x

Tiling: a program has a range of rows, all of one adapter, and one of COLUMNS parts of H. First it
makes f(z) and dZ of its rows, Z_ROWS at a time, from all of dY, and leaves them in its own memory.
Then it goes over its columns, COLS at a time: their share of dW_u and dW_d stays in registers while
it goes over the rows again, ROWS at a time, and each tile gives dX. bottleneck_sums adds the row
ranges' shares.

Bytes, for dY of o bytes an element. Memory: 3 M H o of dY, x and dX, M d o of z and, with P row
ranges, 8 P d H of the shares, written; 2 COLUMNS M RANKS o of f(z) and dZ. Executed moreover:
COLUMNS reads of dY, f(z) and dZ for each tile of columns, W_u for every block of Z_ROWS rows in
each of COLUMNS programs, W_d for every range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fusetune._triton._activation import activate, slope
from fusetune._triton._tile import PROGRAMS, dot_wide, keep_mask, rank_block, signed, terms
from fusetune._triton.bottleneck import blocks_table, matrix_tile, rows_of
from fusetune._triton.bottleneck_sums import (
    Gradients,
    empty_gradients,
    places_of,
    ranges_of,
    sum_shares,
)

_LONGEST = 512  # rows of a range, as long as there are few ranges
_FEW_RANGES = 32


@triton.jit
def _dx(dz, w, acc, NARROW: tl.constexpr, TERMS: tl.constexpr):
    """acc + dz w, for an x of dtype NARROW. fp16 has not dz's range: three TF32 products do."""
    if dz.dtype == tl.float32 and NARROW == tl.float16:  # noqa: SIM300 -- a type, no constant
        acc = tl.dot(dz, w.to(tl.float32), acc, input_precision="tf32x3")
    else:
        acc = dot_wide(dz.to(NARROW), w, acc, TERMS)
    return acc


@triton.jit
def _backward(
    dy,
    x,
    down,
    up,
    z,
    seed,
    table,
    a,
    dz,
    dx,
    shares,
    M,
    H,
    d,
    stride_dy,
    stride_x,
    rows_each,
    cols_each,
    up_at,
    up_bias_at,
    down_bias_at,
    size,
    threshold,
    factor,
    ACTIVATION: tl.constexpr,
    GROUPED: tl.constexpr,
    SAME: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_PARAMETERS: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    TERMS: tl.constexpr,
    Z_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANKS: tl.constexpr,
):
    group, first, end = rows_of(table, M, rows_each, GROUPED)
    part = tl.program_id(1)
    rank, offset = tl.arange(0, RANKS), tl.arange(0, COLS)
    rank_valid = rank < d
    down += group * d * H
    up += group * d * H
    a += part.to(tl.int64) * M * RANKS
    dz += part.to(tl.int64) * M * RANKS
    shares += tl.program_id(0).to(tl.int64) * size
    key = 0
    if DROPOUT:
        key = tl.load(seed)
    down_bias = tl.zeros((RANKS,), tl.float32)
    for start in range(first, end, Z_ROWS):
        row = start + tl.arange(0, Z_ROWS)
        acc = tl.zeros((Z_ROWS, RANKS), tl.float32)
        for k in range(0, H, COLS):
            col = k + offset
            du = matrix_tile(dy, row, col, end, H, stride_dy)
            if DROPOUT:
                du = tl.where(keep_mask(key, row, k, H, threshold, COLS, ALIGNED), du, 0.0)
            w = tl.load(
                up + col[:, None] * d + rank[None, :],
                mask=(col < H)[:, None] & rank_valid[None, :],
                other=0.0,
            )
            acc = dot_wide(du, w, acc, TERMS)
        kept = matrix_tile(z, row, rank, end, d, d).to(tl.float32)
        acc *= slope(kept, ACTIVATION) * factor
        # Zeroed where they are zero: a product that is summed at once would be fused into the sum,
        # and differently in each of the lanes that add it up.
        acc = tl.where((row < end)[:, None], acc, 0.0)
        down_bias += tl.sum(acc, axis=0)
        at = row[:, None] * RANKS + rank[None, :]
        tl.store(dz + at, acc.to(dz.dtype.element_ty), mask=(row < end)[:, None])
        if NEED_PARAMETERS:
            kept = activate(kept, ACTIVATION).to(a.dtype.element_ty)
            tl.store(a + at, kept, mask=(row < end)[:, None])
    if NEED_PARAMETERS and part == 0:
        tl.store(shares + down_bias_at + rank, down_bias, mask=rank_valid)
    tl.debug_barrier()  # f(z) and dZ are read by other threads than wrote them
    first_col = part * cols_each
    for k in range(first_col, tl.minimum(first_col + cols_each, H), COLS):
        col = k + offset
        col_valid = col < H
        w = tl.load(
            down + rank[:, None] * H + col[None, :],
            mask=rank_valid[:, None] & col_valid[None, :],
            other=0.0,
        )
        down_share = tl.zeros((COLS, RANKS), tl.float32)
        up_share = tl.zeros((COLS, RANKS), tl.float32)
        up_bias = tl.zeros((COLS,), tl.float32)
        for start in tl.range(first, end, ROWS, num_stages=1):  # registers are full as it is
            row = start + tl.arange(0, ROWS)
            narrow = matrix_tile(dz, row, rank, end, RANKS, RANKS)
            upper = matrix_tile(dy, row, col, end, H, stride_dy)
            if NEED_PARAMETERS:
                du = upper
                if DROPOUT:
                    du = tl.where(keep_mask(key, row, k, H, threshold, COLS, ALIGNED), du, 0.0)
                active = matrix_tile(a, row, rank, end, RANKS, RANKS)
                up_share = dot_wide(tl.trans(du), active, up_share, 1)
                up_bias += tl.sum(du.to(tl.float32), axis=0)
                tile = matrix_tile(x, row, col, end, H, stride_x)
                down_share = dot_wide(tl.trans(tile), narrow, down_share, TERMS)
            if NEED_DX:
                out = tl.zeros((ROWS, COLS), tl.float32)
                out = _dx(narrow, w, out, dy.dtype.element_ty, TERMS)
                if SAME:
                    out += upper.to(tl.float32)
                inside = (row < end)[:, None] & col_valid[None, :]
                at = row[:, None] * H + col[None, :]
                tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)
        if NEED_PARAMETERS:
            inside = col_valid[:, None] & rank_valid[None, :]
            at = shares + rank[None, :] * H + col[:, None]
            tl.store(at, down_share, mask=inside)
            at = shares + up_at + col[:, None] * d + rank[None, :]
            tl.store(at, up_share * factor, mask=inside)
            tl.store(shares + up_bias_at + col, up_bias * factor, mask=col_valid)


class Plan(NamedTuple):
    """How the work is cut; `plan` makes it."""

    z_rows: int  # of a block that dZ is made of
    rows: int  # of a block that the gradients are made of
    cols: int
    warps: int
    stages: int
    rows_each: int  # of a range
    columns: int  # parts of H


def plan(m: int, h: int, x: torch.dtype, ranks: int, n_terms: int, dropout: bool) -> Plan:
    """Few ranges of rows, as each has a share of all parameters' gradients; and PROGRAMS in all.

    Where a product takes several terms there are more ranges: every part of H makes all of dZ.
    """
    z_rows, rows, cols, warps, stages = _tiles(x, ranks, n_terms, dropout)
    ranges = _FEW_RANGES if n_terms == 1 else 2 * _FEW_RANGES
    while ranges < PROGRAMS and m > ranges * _LONGEST:
        ranges *= 2
    rows_each = rows * triton.cdiv(triton.cdiv(m, rows), ranges)
    columns = min(PROGRAMS // ranges, triton.cdiv(h, cols))
    return Plan(z_rows, rows, cols, warps, stages, rows_each, columns)


def _tiles(
    x: torch.dtype, ranks: int, n_terms: int, dropout: bool
) -> tuple[int, int, int, int, int]:
    """(Z_ROWS, ROWS, COLS, warps, stages). Chosen so that nothing spills."""
    if x == torch.float32:
        return 16, 16, 32 if ranks <= 64 else 16, 8, 2
    if ranks <= 64:
        few = dropout or n_terms > 1
        return 64 if n_terms == 1 else 32, 16 if few else 32, 64, 8, 2
    return 32, 16, 32, 8, 2


def launch_bottleneck_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    down_weight: torch.Tensor,
    up_weight: torch.Tensor,
    z: torch.Tensor,
    rows: Sequence[int],
    activation: str,
    same: bool,
    need_dx: bool,
    need_parameters: bool,
    seed: torch.Tensor | None = None,
    threshold: int = 0,
    factor: float = 1.0,
    *,
    arch: int = 80,
) -> Gradients:
    """dX in x's dtype, gradients of weights in theirs, of biases in fp32; or None for each.

    dy: [M, H] like x, rows contiguous; the others as they went forward, z as it came out.
    """
    (m, h), (g, d), device = x.shape, down_weight.shape[:2], x.device
    grads = empty_gradients(x, down_weight, up_weight, need_dx, need_parameters)
    if m == 0 or not (need_dx or need_parameters):
        return grads
    n_terms, block = terms(down_weight, x.dtype, arch), rank_block(d)
    cut = plan(m, h, x.dtype, block, n_terms, seed is not None)
    table = blocks_table(tuple(rows), cut.rows_each, device) if g > 1 else None
    ranges = triton.cdiv(m, cut.rows_each) if table is None else len(table)
    narrow = x.dtype if n_terms == 1 else torch.float32  # dW_d has its weight's precision
    a, dz = (
        torch.empty(cut.columns, m, block, dtype=dtype, device=device)
        for dtype in (x.dtype, narrow)
    )
    places, size = places_of(h, d)
    shares = dz
    if need_parameters:
        shares = torch.empty(ranges, size, dtype=torch.float32, device=device)
    _backward[(ranges, cut.columns)](
        dy,
        x,
        down_weight,
        up_weight,
        z,
        z if seed is None else seed,
        z if table is None else table,
        a,
        dz,
        dy if grads.dx is None else grads.dx,
        shares,
        m,
        h,
        d,
        dy.stride(0),
        x.stride(0),
        cut.rows_each,
        cut.cols * triton.cdiv(triton.cdiv(h, cut.cols), cut.columns),
        *places,
        size,
        signed(threshold),
        factor,
        ACTIVATION=activation,
        GROUPED=table is not None,
        SAME=same,
        NEED_DX=need_dx,
        NEED_PARAMETERS=need_parameters,
        DROPOUT=seed is not None,
        ALIGNED=seed is not None and h % 4 == 0,
        TERMS=n_terms,
        Z_ROWS=cut.z_rows,
        ROWS=cut.rows,
        COLS=cut.cols,
        RANKS=block,
        num_warps=cut.warps,
        enable_fp_fusion=True,
        num_stages=cut.stages,
    )
    if need_parameters:
        table = None if table is None else ranges_of(tuple(rows), cut.rows_each, device)
        sum_shares(shares, table, grads)
    return grads
