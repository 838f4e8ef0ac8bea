"""The gradients of a bottleneck adapter: dX and all of its parameters' from one launch.

    dU = drop'(dY)    dZ = (dU W_u) f'(z)    dX = dZ W_d (+ dY)    dW_u = dU^T f(z)    dW_d = dZ^T x

Tiling: a program has a range of rows, all of one adapter, and one of COLUMNS parts of H. First it
makes f(z) and dZ of its rows, ROWS at a time, from all of dY, and leaves them in memory of its own.
Then it goes over its columns, COLS at a time: their share of dW_u and dW_d stays in registers while
it goes over the rows again, and each tile gives dX. Shares of row ranges are added in their order
by a second launch: no atomics, always the same result.

Bytes, for dY of o bytes an element: 3 M H o of dY, x and dX, 2 M d o of z and dZ and, with P row
ranges, 16 P d H of the shares, written and read; from the cache, COLUMNS more reads of dY, as many
of f(z) and dZ as there are tiles of columns, and the weights for every block of rows.
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

_SUM_BLOCK = 512
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
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANKS: tl.constexpr,
):
    group, first, end = rows_of(table, M, rows_each, GROUPED)
    part = tl.program_id(1)
    lane, rank, offset = tl.arange(0, ROWS), tl.arange(0, RANKS), tl.arange(0, COLS)
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
    for start in range(first, end, ROWS):
        row = start + lane
        acc = tl.zeros((ROWS, RANKS), tl.float32)
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
            row = start + lane
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


class Plan(NamedTuple):
    """How the work is cut; `plan` makes it."""

    rows: int  # of a block
    cols: int
    warps: int
    stages: int
    rows_each: int  # of a range
    columns: int  # parts of H


def plan(m: int, h: int, x: torch.dtype, ranks: int, n_terms: int, quads: bool | None) -> Plan:
    """Few ranges of rows, as each has a share of all parameters' gradients; and PROGRAMS in all.

    Where a product takes several terms there are more ranges: every part of H makes all of dZ.

    quads: of a dropout, whether one counter serves four elements.
    """
    rows, cols, warps, stages = _tiles(x, ranks, n_terms, quads)
    ranges = _FEW_RANGES if n_terms == 1 else 2 * _FEW_RANGES
    while ranges < PROGRAMS and m > ranges * _LONGEST:
        ranges *= 2
    rows_each = rows * triton.cdiv(triton.cdiv(m, rows), ranges)
    columns = min(PROGRAMS // ranges, triton.cdiv(h, cols))
    return Plan(rows, cols, warps, stages, rows_each, columns)


def _tiles(
    x: torch.dtype, ranks: int, n_terms: int, quads: bool | None
) -> tuple[int, int, int, int]:
    """(ROWS, COLS, warps, stages)"""
    if x == torch.float32:
        return 16, 32 if ranks <= 64 else 16, 8, 2
    if ranks <= 64:
        return (32, 64, 8, 2) if n_terms == 1 else (16, 64, 8, 2)
    return 16, 32, 8, 2


class Gradients(NamedTuple):
    dx: torch.Tensor | None
    down_weight: torch.Tensor | None
    down_bias: torch.Tensor | None
    up_weight: torch.Tensor | None
    up_bias: torch.Tensor | None


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
    (m, h), (g, d) = x.shape, down_weight.shape[:2]
    new, device = torch.empty if m else torch.zeros, x.device
    grads = Gradients(
        new(m, h, dtype=x.dtype, device=device) if need_dx else None,
        *(
            new(shape, dtype=dtype, device=device) if need_parameters else None
            for shape, dtype in (
                (down_weight.shape, down_weight.dtype),
                ((g, d), torch.float32),
                (up_weight.shape, up_weight.dtype),
                ((g, h), torch.float32),
            )
        ),
    )
    if m == 0 or not (need_dx or need_parameters):
        return grads
    n_terms, block = terms(down_weight, x.dtype, arch), rank_block(d)
    quads = None if seed is None else h % 4 == 0
    cut = plan(m, h, x.dtype, block, n_terms, quads)
    table = blocks_table(tuple(rows), cut.rows_each, device) if g > 1 else None
    ranges = triton.cdiv(m, cut.rows_each) if table is None else len(table)
    narrow = x.dtype if n_terms == 1 else torch.float32  # dW_d has its weight's precision
    a, dz = (
        torch.empty(cut.columns, m, block, dtype=dtype, device=device)
        for dtype in (x.dtype, narrow)
    )
    weight_size, bias_size, narrow_size = (
        _SUM_BLOCK * triton.cdiv(n, _SUM_BLOCK) for n in (d * h, h, d)
    )
    places = (weight_size, 2 * weight_size, 2 * weight_size + bias_size)
    size = places[2] + narrow_size
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
        ALIGNED=bool(quads),
        TERMS=n_terms,
        ROWS=cut.rows,
        COLS=cut.cols,
        RANKS=block,
        num_warps=cut.warps,
        enable_fp_fusion=True,
        num_stages=cut.stages,
    )
    if need_parameters:
        _sum_shares[(size // _SUM_BLOCK, g)](
            shares,
            z if table is None else _ranges_of(tuple(rows), cut.rows_each, device),
            ranges,
            grads.down_weight,
            grads.up_weight,
            grads.up_bias,
            grads.down_bias,
            h,
            d,
            *places,
            size,
            GROUPED=table is not None,
            BLOCK=_SUM_BLOCK,
            num_warps=4,
        )
    return grads


def _ranges_of(rows: tuple[int, ...], size: int, device: torch.device) -> torch.Tensor:
    """int64 [G + 1]: where the ranges of each group begin among all."""
    counts = torch.tensor([0, *(triton.cdiv(n, size) for n in rows)], dtype=torch.int64)
    return counts.cumsum(0).to(device)
