"""Attention to a prefix, merged into the attention to other keys that out and lse hold: one pass.

Tiling: a program has ROWS rows of out, all of one head of keys: every token of every query head of
the group and, where all share one prefix without dropout, of every batch row. The softmax goes on
where the base attention stopped, with its lse for the largest score and 1 for the sum, COLS keys
of the prefix at a time; the result takes the place of out and lse. Elements that dropout removes
are drawn from their seed in registers.

Bytes, for a query of M rows in all, D elements of o bytes: M D o of query, M D o of out and 4 M of
lse, read and written. The prefix, 2 P Hkv D elements, lies in memory once and is read from the
cache by each of M / ROWS programs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fusetune._triton._prefix import (
    Options,
    masked_scores,
    offset,
    place,
    prefix_of,
    prefix_tile,
    products,
    row_tile,
)
from fusetune._triton._tile import rank_block, terms

MOST_DIMS = 256  # of a head


@triton.jit
def _prefix_attend(
    query,
    key,
    value,
    out,
    lse,
    bias,
    rows,
    lengths,
    seed,
    count,
    T,
    D,
    P,
    REPEAT,
    HEADS,
    BATCH,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    bias_strides,
    scale,
    window,
    position,
    threshold,
    factor,
    BIAS: tl.constexpr,
    ROWED: tl.constexpr,
    PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DIMS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    head_kv, segment = tl.program_id(1), tl.program_id(2)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = r < count
    b, head, token = place(r, segment, head_kv, T, REPEAT)
    group, n = prefix_of(rows, lengths, segment, P, ROWED, PADDED)
    key += group * key_strides[0] + head_kv * key_strides[2]
    value += group * value_strides[0] + head_kv * value_strides[2]
    query_row = offset(b, head, token, query_strides)
    bias_row = offset(b, head, token, bias_strides)
    at = out + (offset(b, head, token, out_strides))[:, None] + tl.arange(0, DIMS)[None, :]
    inside = valid[:, None] & (tl.arange(0, DIMS) < D)[None, :]
    at_lse = lse + (b * HEADS * REPEAT + head) * T + token

    x = row_tile(query, query_row, valid, 0, D, DIMS)
    largest = tl.load(at_lse, mask=valid, other=0.0)
    nothing = tl.abs(largest) == float("inf")
    largest = tl.where(nothing, float("-inf"), largest)
    total = tl.where(nothing, 0.0, 1.0)
    acc = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    acc = tl.where(nothing[:, None], 0.0, acc)
    tl.debug_barrier()  # other threads may write what was read here
    for start in range(0, n, COLS):
        j = start + tl.arange(0, COLS)
        held = j < n
        drawn = (segment.to(tl.int64) * P + j) * HEADS + head_kv
        drawn_v = drawn + tl.cast(BATCH, tl.int64) * P * HEADS
        key_row, value_row = j * key_strides[1], j * value_strides[1]
        k = prefix_tile(key, key_row, held, 0, D, seed, drawn, threshold, DROPOUT, ALIGNED, DIMS)
        scores = products(
            x, query, query_row, valid, k, key, key_row, held, D, seed, drawn, threshold,
            DROPOUT, ALIGNED, TERMS, DIMS, CHUNK,
        )  # fmt: skip
        scores = masked_scores(
            scores, scale * factor, bias, bias_row, bias_strides[3], j, token, valid, n, window,
            position, BIAS, WINDOW,
        )  # fmt: skip
        top = tl.maximum(largest, tl.max(scores, axis=1))
        shift = tl.where(top == float("-inf"), 0.0, top)
        rescale, p = tl.exp(largest - shift), tl.exp(scores - shift[:, None])
        total = total * rescale + tl.sum(p, axis=1)
        acc *= rescale[:, None]
        largest = top
        v = prefix_tile(
            value, value_row, held, 0, D, seed, drawn_v, threshold, DROPOUT, ALIGNED, DIMS
        )
        p *= factor
        if TERMS == 0 or x.dtype == tl.float32:
            acc = tl.dot(p, v.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(p.to(x.dtype), v.to(x.dtype), acc)
    nothing = total == 0.0
    acc /= tl.where(nothing, 1.0, total)[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside)
    found = tl.where(nothing, float("inf"), largest + tl.log(total))
    tl.store(at_lse, found, mask=valid)


class Tiles(NamedTuple):
    rows: int
    cols: int
    dims: int
    chunk: int
    warps: int


def tiles(query: torch.dtype, d: int, p: int, n_terms: int, plain: bool) -> Tiles:
    """Chosen so that nothing spills. p: how many keys a prefix has; plain: see Options."""
    dims = rank_block(d)
    if n_terms == 0 or query == torch.float32:  # FMA
        chunk = 16 if plain or dims != 128 else 32
        return Tiles(32, 16, dims, chunk, 4 if dims <= 64 else 8)
    cols = min(64 if n_terms == 1 and dims <= 128 else 32, rank_block(p))
    chunk = dims if dims * n_terms <= 128 else 64
    return Tiles(64, cols, dims, chunk, 4 if dims * n_terms <= 64 else 8)


def launch_prefix_attend(
    query: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    options: Options,
    *,
    arch: int = 80,
) -> None:
    """Merges attention to the prefix into out and lse, in place.

    query, out: [B, Hq, T, D], D at most MOST_DIMS, fp32, fp16 or bf16; prefixes: [G, P, Hkv, D], of
    any of these dtypes; elements of D contiguous. lse: fp32 [B, Hq, T], contiguous. bias: [1 or B,
    1 or Hq, T, P]; rows: int64 [B]; lengths: [G], contiguous. +inf or -inf in lse: the row has
    attended to nothing, and out there is not used; +inf is also what such rows are left with.
    """
    batch, heads, t, d = query.shape
    p, heads_kv = prefix_key.shape[1:3]
    if out.numel() == 0:
        return
    n_terms = terms(prefix_key, query.dtype, arch)
    shape = tiles(query.dtype, d, p, n_terms, options.plain)
    segments = batch if options.by_row else 1
    count = query.numel() // (d * heads_kv * segments)
    bias, rows, lengths, seed = options.tensors(lse)
    _prefix_attend[(triton.cdiv(count, shape.rows), heads_kv, segments)](
        query,
        prefix_key,
        prefix_value,
        out,
        lse,
        bias,
        rows,
        lengths,
        seed,
        count,
        t,
        d,
        p,
        heads // heads_kv,
        heads_kv,
        batch,
        query.stride()[:3],
        prefix_key.stride()[:3],
        prefix_value.stride()[:3],
        out.stride()[:3],
        options.bias_strides(),
        *options.numbers(),
        **options.flags(d),
        TERMS=n_terms,
        ROWS=shape.rows,
        COLS=shape.cols,
        DIMS=shape.dims,
        CHUNK=shape.chunk,
        num_warps=shape.warps,
        enable_fp_fusion=True,
        num_stages=1,
    )
