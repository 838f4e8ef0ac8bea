"""What both passes of prefix attention share: a program's rows, tiles of the prefix, scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fusetune._triton._tile import dot_wide, keep_mask, signed


@triton.jit
def place(r, segment, head_kv, T, REPEAT):
    """(batch row, query head, token) of rows r of a segment: [batch, REPEAT, T]."""
    return (segment + r // (T * REPEAT)).to(tl.int64), head_kv * REPEAT + r // T % REPEAT, r % T


@triton.jit
def offset(b, head, token, strides):
    """Where rows of a tensor of [batch, heads, tokens] begin."""
    return b * strides[0] + head * strides[1] + token * strides[2]


@triton.jit
def prefix_of(rows, lengths, segment, P, ROWED: tl.constexpr, PADDED: tl.constexpr):
    """(which prefix a segment has, how many keys of it)."""
    group, n = tl.cast(0, tl.int64), P
    if ROWED:
        group = tl.load(rows + segment)
    if PADDED:
        n = tl.load(lengths + tl.maximum(group, 0)).to(tl.int32)
    if ROWED:
        n = tl.where(group < 0, 0, n)
        group = tl.maximum(group, 0)
    return group, n


@triton.jit
def row_tile(base, row, valid, first, D, DIMS: tl.constexpr):
    """Elements first to first + DIMS of rows that begin at `row`; 0 where there are none."""
    col = first + tl.arange(0, DIMS)
    return tl.load(
        base + row[:, None] + col[None, :], mask=valid[:, None] & (col < D)[None, :], other=0.0
    )


@triton.jit
def prefix_tile(
    base,
    row,
    valid,
    first,
    D,
    seed,
    mask_row,
    threshold,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    DIMS: tl.constexpr,
):
    """`row_tile` of keys or values, dropped out but not yet multiplied by the factor."""
    tile = row_tile(base, row, valid, first, D, DIMS)
    if DROPOUT:
        kept = keep_mask(tl.load(seed), mask_row, first, D, threshold, DIMS, ALIGNED)
        tile = tl.where(kept, tile, 0.0)
    return tile


@triton.jit
def products(
    x_tile,
    x,
    x_row,
    x_valid,
    tile,
    base,
    row,
    valid,
    D,
    seed,
    mask_row,
    threshold,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    TERMS: tl.constexpr,
    DIMS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rows of x times rows of the prefix, [ROWS, COLS]: of the tiles, or, where registers do not
    hold two operands of all elements, from memory, CHUNK elements at a time."""
    acc = tl.zeros((x_row.shape[0], row.shape[0]), tl.float32)
    if CHUNK == DIMS:
        acc = dot_wide(x_tile, tl.trans(tile), acc, TERMS)
    else:
        for first in tl.range(0, DIMS, CHUNK, num_stages=1):
            left = row_tile(x, x_row, x_valid, first, D, CHUNK)
            right = prefix_tile(
                base, row, valid, first, D, seed, mask_row, threshold, DROPOUT, ALIGNED, CHUNK
            )
            acc = dot_wide(left, tl.trans(right), acc, TERMS)
    return acc


@triton.jit
def masked_scores(
    scores,
    scale,
    bias,
    bias_row,
    bias_stride,
    j,
    token,
    valid,
    n,
    window,
    position,
    BIAS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """scale scores + bias, and -inf for keys that a row does not see."""
    scores *= scale
    seen = valid[:, None] & (j < n)[None, :]
    if BIAS:
        at = bias + bias_row[:, None] + (j * bias_stride)[None, :]
        scores += tl.load(at, mask=seen, other=0.0).to(tl.float32)
    if WINDOW:
        seen = seen & (n + position + token[:, None] - j[None, :] < window)
    return tl.where(seen, scores, float("-inf"))


class Options(NamedTuple):
    """What a call has besides tensors of rows. seed: int64 [1]; elements of the prefix whose word
    is below threshold (32 bits) are dropped, for each batch row by itself, the others multiplied by
    the factor."""

    bias: torch.Tensor | None
    rows: torch.Tensor | None
    lengths: torch.Tensor | None
    scale: float
    window: int
    position: int
    seed: torch.Tensor | None = None
    threshold: int = 0
    factor: float = 1.0

    @property
    def by_row(self) -> bool:
        """Whether batch rows have prefixes of their own."""
        return self.rows is not None or self.seed is not None

    @property
    def plain(self) -> bool:
        """Whether all rows see all of one prefix: what takes the fewest registers."""
        given = self.bias, self.rows, self.lengths, self.seed
        return self.window == 0 and all(tensor is None for tensor in given)

    def tensors(self, none: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The kernels' pointers; `none` stands in for one that is not read."""
        given = self.bias, self.rows, self.lengths, self.seed
        return tuple(none if tensor is None else tensor for tensor in given)

    def bias_strides(self) -> tuple[int, ...]:
        """Of a batch row, a head, a token and a key: 0 where the bias is the same for all."""
        if self.bias is None:
            return 0, 0, 0, 0
        pairs = zip(self.bias.shape, self.bias.stride(), strict=True)
        return tuple(0 if size == 1 else stride for size, stride in pairs)

    def numbers(self) -> tuple[float, ...]:
        return self.scale, self.window, self.position, signed(self.threshold), self.factor

    def flags(self, d: int) -> dict[str, bool]:
        return {
            "BIAS": self.bias is not None,
            "ROWED": self.rows is not None,
            "PADDED": self.lengths is not None,
            "WINDOW": self.window > 0,
            "DROPOUT": self.seed is not None,
            "ALIGNED": self.seed is not None and d % 4 == 0,
        }
