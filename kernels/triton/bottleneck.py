"""y = residual + drop(f(x W_d^T + b_d) W_u^T + b_u), and z = x W_d^T + b_d, for d up to 256.

Tiling: a program has ROWS rows, all of one adapter. It goes over H, COLS columns at a time, for z,
which stays in registers, and back over H for y: what it reads twice of x, where x is the residual,
it last read shortly before. Groups of rows come from a table: any number of adapters in one launch.
The mask is drawn from its seed in registers.

Bytes, for x of o bytes an element. Memory: M H o of x and of y, M d o of z, M H o of a residual
that is not x, and 2 d H of parameters, each once, as long as L2 holds x of the rows under way.
Executed, that is loaded into a multiprocessor: x once more as the residual, and the parameters for
each of M / ROWS programs, d / ROWS times what x and y are. P programs load 1 + P d / M times the
least whatever their tiles are: to stay within 1.05 of it, M = 4096 and d = 48 would allow 4. So
1.05 is kept to at memory; benchmarks/budgets.py gates both counts.

Tiles of 128 rows would load less, but put more rows under way than L2 holds. x does not stay on the
chip between its uses: 64 rows of 768 are 96 KiB, which leaves no room for anything else in the
shared memory of sm_86, sm_89 and sm_120, and as registers they spill on sm_80.

There is no layer norm: the one after an adapter (Houlsby's and Pfeiffer's in BERT) takes the sum
with the model's own residual, which the adapter does not see.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fusetune._triton._activation import activate
from fusetune._triton._tile import PROGRAMS, dot_wide, keep_mask, rank_block, signed, terms


def most(activations: torch.dtype, weights: torch.dtype) -> int:
    """The largest d: what registers hold. A weight wider than x takes several terms."""
    return 128 if activations != torch.float32 and weights != activations else 256


@triton.jit
def rows_of(table, M, rows, GROUPED: tl.constexpr):
    """(group, first row, end of the rows) of this program."""
    if GROUPED:
        at = table + tl.program_id(0) * 3
        group, first, end = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    else:
        group = tl.cast(0, tl.int64)
        first = tl.program_id(0).to(tl.int64) * rows
        end = tl.minimum(first + rows, tl.cast(M, tl.int64))
    return group, first, end


@triton.jit
def matrix_tile(base, row, col, end, H, stride):
    """Rows `row` and columns `col` of a matrix [., H], 0 from row `end` on."""
    return tl.load(
        base + row[:, None] * stride + col[None, :],
        mask=(row < end)[:, None] & (col < H)[None, :],
        other=0.0,
    )


@triton.jit
def _down(acc, tile, down, k, H, d, TERMS: tl.constexpr, COLS: tl.constexpr, RANKS: tl.constexpr):
    """acc + tile W_d^T for columns k to k + COLS."""
    col, rank = k + tl.arange(0, COLS), tl.arange(0, RANKS)
    part = tl.load(
        down + rank[None, :] * H + col[:, None],
        mask=(rank < d)[None, :] & (col < H)[:, None],
        other=0.0,
    )
    return dot_wide(tile, part, acc, TERMS)


@triton.jit
def _bottleneck(
    x,
    down,
    down_bias,
    up,
    up_bias,
    residual,
    seed,
    table,
    y,
    z,
    M,
    H,
    d,
    stride_x,
    stride_r,
    threshold,
    factor,
    ACTIVATION: tl.constexpr,
    GROUPED: tl.constexpr,
    DOWN_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    group, first, end = rows_of(table, M, ROWS, GROUPED)
    row, col, rank = first + tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, RANKS)
    down += group * d * H
    up += group * d * H
    up_bias += group * H
    acc = tl.zeros((ROWS, RANKS), tl.float32)
    for k in range(0, H, COLS):
        tile = matrix_tile(x, row, k + col, end, H, stride_x)
        acc = _down(acc, tile, down, k, H, d, TERMS, COLS, RANKS)
    if DOWN_BIAS:
        bias = tl.load(down_bias + group * d + rank, mask=rank < d, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    narrow = (row < end)[:, None] & (rank < d)[None, :]
    tl.store(z + row[:, None] * d + rank[None, :], acc.to(z.dtype.element_ty), mask=narrow)
    a = activate(acc, ACTIVATION).to(x.dtype.element_ty)
    key = 0
    if DROPOUT:
        key = tl.load(seed)
    last = (tl.cdiv(H, COLS) - 1) * COLS
    # Stages of its own: else only what is multiplied is fetched ahead, and the residual is not.
    for done in tl.range(0, H, COLS, num_stages=STAGES):
        k = last - done
        part = tl.load(
            up + (k + col)[None, :] * d + rank[:, None],
            mask=(rank < d)[:, None] & (k + col < H)[None, :],
            other=0.0,
        )
        out = dot_wide(a, part, tl.zeros((ROWS, COLS), tl.float32), TERMS)
        if UP_BIAS:
            out += tl.load(up_bias + k + col, mask=k + col < H, other=0.0).to(tl.float32)[None, :]
        if DROPOUT:
            kept = keep_mask(key, row, k, H, threshold, COLS, ALIGNED)
            out = tl.where(kept, out * factor, 0.0)
        if ADD:
            out += matrix_tile(residual, row, k + col, end, H, stride_r).to(tl.float32)
        inside = (row < end)[:, None] & (k + col < H)[None, :]
        at = row[:, None] * H + (k + col)[None, :]
        tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


class Tiles(NamedTuple):
    rows: int
    cols: int
    warps: int
    stages: int


def tiles(m: int, h: int, x: torch.dtype, ranks: int, n_terms: int) -> Tiles:
    """Chosen so that nothing spills. ranks: d as the tiles have it."""
    if x == torch.float32:
        return Tiles(32, 32 if ranks <= 128 else 16, 4 if ranks <= 64 else 8, 2)
    vectors = h % 8 == 0  # else addresses take the registers
    if ranks <= 64:
        if n_terms > 1:
            return Tiles(64, 32, 8, 3)
        return Tiles(64, 64 if vectors else 32, 8, 4)
    # Twice as many halve what is loaded of the weights, if half of the multiprocessors have any.
    rows = 64 if vectors and m >= 64 * PROGRAMS // 2 else 32
    if n_terms > 1:
        return Tiles(rows, 16, 8, 2)
    return Tiles(rows, 64, 8, 3) if ranks <= 128 else Tiles(rows, 32, 8, 2)


@lru_cache(maxsize=64)
def blocks_table(rows: tuple[int, ...], size: int, device: torch.device) -> torch.Tensor:
    """int64 [blocks, 3]: (group, first row, end) of every block of at most `size` rows."""
    table, start = [], 0
    for group, count in enumerate(rows):
        end = start + count
        table += [(group, at, min(at + size, end)) for at in range(start, end, size)]
        start = end
    return torch.tensor(table, dtype=torch.int64, device=device)


def launch_bottleneck(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    rows: Sequence[int],
    activation: str,
    residual: torch.Tensor | None,
    same: bool,
    seed: torch.Tensor | None = None,
    threshold: int = 0,
    factor: float = 1.0,
    *,
    arch: int = 80,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [M, H], z [M, d]), both in x's dtype.

    x, residual: [M, H], rows contiguous, fp32, fp16 or bf16; `same`: x is the residual. weights
    [G, d, H] and [G, H, d] and biases [G, d] and [G, H]: contiguous, any of these dtypes, both
    weights of one; group g serves the g-th run of `rows`, which sum to M. seed: int64 [1]; elements
    whose word is below threshold (32 bits) are dropped, the others multiplied by the factor.
    """
    (m, h), d = x.shape, down_weight.shape[1]
    y = torch.empty(m, h, dtype=x.dtype, device=x.device)
    z = torch.empty(m, d, dtype=x.dtype, device=x.device)
    if m == 0:
        return y, z
    n_terms, block = terms(down_weight, x.dtype, arch), rank_block(d)
    quads = None if seed is None else h % 4 == 0
    shape = tiles(m, h, x.dtype, block, n_terms)
    table = blocks_table(tuple(rows), shape.rows, x.device) if len(rows) > 1 else None
    added = x if same else residual
    _bottleneck[(triton.cdiv(m, shape.rows) if table is None else len(table),)](
        x,
        down_weight,
        z if down_bias is None else down_bias,
        up_weight,
        z if up_bias is None else up_bias,
        x if added is None else added,
        z if seed is None else seed,
        z if table is None else table,
        y,
        z,
        m,
        h,
        d,
        x.stride(0),
        0 if added is None else added.stride(0),
        signed(threshold),
        factor,
        ACTIVATION=activation,
        GROUPED=table is not None,
        DOWN_BIAS=down_bias is not None,
        UP_BIAS=up_bias is not None,
        ADD=added is not None,
        DROPOUT=seed is not None,
        ALIGNED=bool(quads),
        TERMS=n_terms,
        ROWS=shape.rows,
        COLS=shape.cols,
        RANKS=block,
        STAGES=shape.stages,
        num_warps=shape.warps,
        enable_fp_fusion=True,
        num_stages=shape.stages,
    )
    return y, z
