"""What LoRA adds to a tile of the base product: one adapter's part, or several adapters'."""

from __future__ import annotations

import triton
import triton.language as tl

from fusetune._triton._adapters import record
from fusetune._triton._tile import keep_mask


@triton.jit
def add_tail(
    acc,
    s,
    b,
    start,
    row_valid,
    col,
    N,
    r,
    stride_bn,
    stride_br,
    scaling,
    DTYPE: tl.constexpr,
    RANKS: tl.constexpr,
):
    """acc + scaling s b, a row of s from its `start` on, b [r, N] with its strides, in DTYPE."""
    rank = tl.arange(0, RANKS)
    for r0 in range(0, r, RANKS):
        valid = r0 + rank < r
        left = tl.load(
            s + start[:, None] + (r0 + rank)[None, :],
            mask=row_valid[:, None] & valid[None, :],
            other=0.0,
        )
        right = tl.load(
            b + (r0 + rank)[:, None] * stride_br + col[None, :] * stride_bn,
            mask=valid[:, None] & (col < N)[None, :],
            other=0.0,
        )
        acc = tl.dot((left * scaling).to(DTYPE), right.to(DTYPE), acc, input_precision="ieee")
    return acc


@triton.jit
def add_tails(
    acc,
    s,
    b,
    lora_bias,
    seeds,
    records,
    places,
    adapters,
    block,
    row,
    first_col,
    M,
    N,
    DTYPE: tl.constexpr,
    DX: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    COLS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """acc + the parts of the adapters that serve a row, which no other row's adapter touches.

    b: every B [N, r] one after the other, or, with DX, every A [r, N]. DROPOUT: of DX's parts.
    """
    col = first_col + tl.arange(0, COLS)
    narrow = row.to(tl.int32)  # divisions in 64 bits take registers
    entry, inside, entries = narrow // block, narrow % block, tl.cdiv(M, block)
    for i in range(adapters):
        place = tl.load(places + i * entries + entry, mask=row < M, other=-1)
        own = place >= 0
        if tl.max(own.to(tl.int32), 0) > 0:
            r, before, _, _, _, threshold, factor, scaling = record(records, i)
            start = place.to(tl.int64) * block + inside * r
            part = tl.zeros(acc.shape, tl.float32)
            if DX:  # the scaling is in dS
                part = add_tail(
                    part, s, b + before * N, start, own, col, N, r, 1, N, 1.0, DTYPE, RANKS
                )
            else:
                part = add_tail(
                    part, s, b + before * N, start, own, col, N, r, r, 1, scaling, DTYPE, RANKS
                )
            kept = own[:, None]
            if DROPOUT:
                key = tl.load(seeds + i)
                kept &= keep_mask(key, row, first_col, N, threshold, COLS, ALIGNED)
                part *= factor
            if BIAS:
                at = lora_bias + i * tl.cast(N, tl.int64) + col
                part += tl.load(at, mask=col < N, other=0.0)[None, :]
            acc = tl.where(kept, acc + part, acc)
    return acc
