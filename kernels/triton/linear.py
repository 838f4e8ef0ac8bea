"""y = x W^T + s B^T + bias and dX = dY W + mask * (dS A): a matrix product with LoRA in its tail.

Tiling: one program makes a tile [ROWS, COLS] of the result, DEPTH of the inner dimension at a time;
neighbouring programs share operands in the cache (GROUP rows of tiles together). The adapter's
factors come first: their product, RANKS at a time, is what the accumulator starts from, so that the
result is written once and never read; in dX it is masked there, the mask drawn in registers.

Bytes: the three dense operands, and (M + N) r of the factors.

W is dense here, in x's dtype. fp32 products are IEEE's, not TF32's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fusetune._triton._adapters import Plan
from fusetune._triton._tail import add_tail, add_tails
from fusetune._triton._tile import keep_mask, signed

_GROUP = 8


class Tiles(NamedTuple):
    """Of the base product; `tiles` has the table."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


# By compute capability: 16-bit activations, M above 64. Chosen by what fits: shared memory of 163,
# 99 and 227 kB, no spilled registers, wgmma's 64 rows a warp group on sm_90.
_TABLE = {
    80: Tiles(128, 128, 64, 8, 3),
    86: Tiles(128, 128, 64, 8, 3),
    89: Tiles(128, 128, 64, 8, 3),
    90: Tiles(128, 256, 64, 8, 3),
    100: Tiles(128, 256, 64, 8, 3),
    120: Tiles(128, 128, 64, 8, 3),
}
_SEVERAL = Tiles(64, 128, 64, 8, 3)  # each adapter's part is made apart: half the registers
_MASKED = {90: Tiles(128, 128, 64, 8, 3), 100: Tiles(128, 128, 64, 8, 3)}  # with dropout
_SMALL = Tiles(32, 64, 64, 4, 3)
_SMALL_OF = {120: Tiles(32, 64, 64, 8, 3)}  # four warps spill there
_FP32 = Tiles(64, 64, 16, 4, 2)


def tiles(
    arch: int, m: int, dtype: torch.dtype, quads: bool | None = None, several: bool = False
) -> Tiles:
    """The tiles for a device of capability `arch` (80, 86, ...). An unknown one has sm_86's.

    quads: of a dropout, whether one counter serves four elements: otherwise masks take registers.
    several: adapters.
    """
    if dtype == torch.float32:
        return _FP32
    if m <= 64 or quads is False or arch < 80:
        return _SMALL_OF.get(arch, _SMALL)
    if several:
        return _SEVERAL
    known = arch if arch in _TABLE else 86
    return _TABLE[known] if quads is None else _MASKED.get(known, _TABLE[known])


@triton.jit
def _tile_of(M, N, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr):
    """(row, column) of this program's tile: GROUP rows of tiles are worked on together."""
    row_tiles, col_tiles = tl.cdiv(M, ROWS), tl.cdiv(N, COLS)
    group = tl.program_id(0) // (GROUP * col_tiles)
    first = group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    inside = tl.program_id(0) % (GROUP * col_tiles)
    return first + inside % size, inside // size


@triton.jit
def _linear(
    x,
    w,
    s,
    b,
    bias,
    col_scale,
    seed,
    z,
    y,
    lora_bias,
    records,
    places,
    M,
    N,
    K,
    r,
    adapters,
    block,
    stride_x,
    stride_wn,
    stride_wk,
    stride_bn,
    stride_br,
    stride_y,
    scaling,
    threshold,
    factor,
    BASE: tl.constexpr,
    TAIL: tl.constexpr,
    TAILS: tl.constexpr,
    DX: tl.constexpr,
    BIAS: tl.constexpr,
    LORA_BIAS: tl.constexpr,
    COL_SCALE: tl.constexpr,
    KEEP: tl.constexpr,
    ADD: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANKS: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tile, col_tile = _tile_of(M, N, ROWS, COLS, GROUP)
    row = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = col_tile.to(tl.int64) * COLS + tl.arange(0, COLS)
    inner = tl.arange(0, DEPTH)
    row_valid, col_valid = row < M, col < N
    inside = row_valid[:, None] & col_valid[None, :]
    target = y + row[:, None] * stride_y + col[None, :]
    acc = tl.zeros((ROWS, COLS), tl.float32)
    if TAIL:  # first: what its mask needs besides the accumulator is then free for the loop
        dtype: tl.constexpr = y.dtype.element_ty
        acc = add_tail(
            acc, s, b, row * r, row_valid, col, N, r, stride_bn, stride_br, scaling, dtype, RANKS
        )
        if DROPOUT:
            kept = keep_mask(tl.load(seed), row, col_tile * COLS, N, threshold, COLS, ALIGNED)
            acc = tl.where(kept, acc * factor, 0.0)
    if TAILS:
        acc = add_tails(
            acc, s, b, lora_bias, seed, records, places, adapters, block, row, col_tile * COLS,
            M, N, y.dtype.element_ty, DX, LORA_BIAS, DROPOUT, ALIGNED, COLS, RANKS,
        )  # fmt: skip
    if BASE:
        x_at = x + row[:, None] * stride_x + inner[None, :]
        w_at = w + inner[:, None] * stride_wk + col[None, :] * stride_wn
        for k in range(0, K, DEPTH):
            left = tl.load(x_at, mask=row_valid[:, None] & (k + inner < K)[None, :], other=0.0)
            right = tl.load(w_at, mask=(k + inner < K)[:, None] & col_valid[None, :], other=0.0)
            acc = tl.dot(left, right, acc, input_precision="ieee")
            x_at += DEPTH
            w_at += DEPTH * stride_wk
    if KEEP:
        tl.store(z + row[:, None] * N + col[None, :], acc.to(z.dtype.element_ty), mask=inside)
    if COL_SCALE:
        acc *= tl.load(col_scale + col, mask=col_valid, other=0.0)[None, :]
    if ADD:
        acc += tl.load(target, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        acc += tl.load(bias + col, mask=col_valid, other=0.0)[None, :]
    tl.store(target, acc.to(y.dtype.element_ty), mask=inside)


class Tail(NamedTuple):
    """scaling s b: s fp32 [M, r], contiguous; b any dtype, [N, r] with any strides."""

    s: torch.Tensor
    b: torch.Tensor
    scaling: float


class Tails(NamedTuple):
    """Several adapters' parts, of the rows that each of them serves."""

    s: torch.Tensor  # fp32, as `plan` says
    b: torch.Tensor  # every B [N, r] one after the other; for dX every A
    plan: Plan
    dx: bool = False
    lora_bias: torch.Tensor | None = None  # fp32 [adapters, N]
    seeds: torch.Tensor | None = None  # int64 [adapters]: of dX's dropout


class Dropout(NamedTuple):
    """Of the tail: what draws its mask (int64 [1], 32 bits) and the factor of what is kept."""

    seed: torch.Tensor
    threshold: int
    factor: float


def launch_linear(
    x: torch.Tensor | None,
    w: torch.Tensor | None,
    y: torch.Tensor,
    *,
    arch: int,
    tail: Tail | None = None,
    tails: Tails | None = None,
    bias: torch.Tensor | None = None,
    col_scale: torch.Tensor | None = None,
    dropout: Dropout | None = None,
    z: torch.Tensor | None = None,
    add: bool = False,
) -> None:
    """y = col_scale * (x w^T + drop(tail)) + bias; with `add`, or without x and w, added to y.

    tails: instead of tail and dropout.

    x: [M, K], rows contiguous; w: [N, K] with any strides, in x's dtype (dX passes its W
    transposed); y: [M, N], rows contiguous, fp32, fp16 or bf16; bias, col_scale: fp32 [N],
    contiguous; z: [M, N], contiguous, gets what col_scale multiplies.
    """
    m, n = y.shape
    if m == 0 or n == 0:
        return
    base = x is not None and w is not None
    seed = y if dropout is None else dropout.seed
    dropped, rank = dropout is not None, 0 if tail is None else tail.s.shape[1]
    plan = None if tails is None else tails.plan
    if tails is not None:
        rank, dropped = max(tails.plan.ranks), tails.seeds is not None
        seed = y if tails.seeds is None else tails.seeds
    quads = n % 4 == 0 if dropped else None
    shape = tiles(arch, m, y.dtype, quads, tails is not None)
    lora_bias = None if tails is None else tails.lora_bias
    low: Tail | Tails | None = tail if tails is None else tails
    _linear[(triton.cdiv(m, shape.rows) * triton.cdiv(n, shape.cols),)](
        x if base else y,
        w if base else y,
        y if low is None else low.s,
        y if low is None else low.b,
        y if bias is None else bias,
        y if col_scale is None else col_scale,
        seed,
        y if z is None else z,
        y,
        y if lora_bias is None else lora_bias,
        y if plan is None else plan.records,
        y if plan is None else plan.places,
        m,
        n,
        x.shape[1] if x is not None else 0,
        0 if tail is None else rank,
        0 if plan is None else len(plan.ranks),
        0 if plan is None else m // plan.entries,
        x.stride(0) if x is not None else 0,
        w.stride(0) if w is not None else 0,
        w.stride(1) if w is not None else 0,
        0 if tail is None else tail.b.stride(0),
        0 if tail is None else tail.b.stride(1),
        y.stride(0),
        1.0 if tail is None else tail.scaling,
        0 if dropout is None else signed(dropout.threshold),
        1.0 if dropout is None else dropout.factor,
        BASE=base,
        TAIL=tail is not None,
        TAILS=tails is not None,
        DX=tails is not None and tails.dx,
        BIAS=bias is not None,
        LORA_BIAS=lora_bias is not None,
        COL_SCALE=col_scale is not None,
        KEEP=z is not None,
        ADD=add or not base,
        DROPOUT=dropped,
        ALIGNED=bool(quads),
        ROWS=shape.rows,
        COLS=shape.cols,
        DEPTH=shape.depth,
        RANKS=16 if rank <= 16 else 32,
        GROUP=_GROUP,
        num_warps=shape.warps,
        enable_fp_fusion=True,
        num_stages=shape.stages,
    )
