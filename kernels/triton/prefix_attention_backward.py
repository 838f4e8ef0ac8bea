"""The gradients of attention to a prefix: added to the query's, and those of its keys and values.

    p = e^(s - lse)    ds = scale p (dout V^T - delta)    dQ += ds K    dK = ds^T Q    dV = p^T dout

Tiling: a program has one head of keys and a range of its rows (see prefix_attention.py). It holds
COLS keys, their values and both gradients, which it sums while it goes over its rows, ROWS at a
time; longer prefixes take it over its rows again for the next COLS. Each range leaves its share of
dK and dV, and a second launch adds these in their order: no atomics, always the same result.

Bytes, for a query of M rows in all, D elements of o bytes: M D o of each of query, dout and out,
4 M of lse, M D o of dquery, read and written; for a prefix of N = 2 P Hkv D elements and R ranges
8 R N of shares, R at least 4 row blocks long and as few as fill the card. All but the shares once
more, from the cache or not, for every further COLS keys. A dquery with a launch of its own (see
`tiles`) has query, dout, out and lse read for it.
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
from fusetune._triton._tile import dot_wide, keep_mask, rank_block, splits, terms
from fusetune._triton.prefix_attention_sums import sum_prefix


@triton.jit
def _dq(ds, k, acc, NARROW: tl.constexpr, TERMS: tl.constexpr):
    """acc + ds k, for a query of dtype NARROW. fp16 has not ds's range, TF32 has."""
    if NARROW == tl.float16 and TERMS == 1:  # noqa: SIM300 -- a type, no constant
        acc = tl.dot(ds, k.to(tl.float32), acc, input_precision="tf32")
    elif NARROW == tl.float16 and TERMS > 1:  # noqa: SIM300
        acc = tl.dot(ds, k.to(tl.float32), acc, input_precision="tf32x3")
    else:
        acc = dot_wide(ds.to(NARROW), k, acc, TERMS)
    return acc


@triton.jit
def _prefix_attend_backward(
    dout,
    query,
    key,
    value,
    out,
    lse,
    dquery,
    shares,
    bias,
    rows,
    lengths,
    seed,
    count,
    steps,
    T,
    D,
    P,
    REPEAT,
    HEADS,
    BATCH,
    dout_strides,
    query_strides,
    key_strides,
    value_strides,
    out_strides,
    dquery_strides,
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
    NEED_DQUERY: tl.constexpr,
    NEED_DPREFIX: tl.constexpr,
    FRESH: tl.constexpr,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DIMS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    head_kv, segment = tl.program_id(1), tl.program_id(2)
    group, n = prefix_of(rows, lengths, segment, P, ROWED, PADDED)
    key += group * key_strides[0] + head_kv * key_strides[2]
    value += group * value_strides[0] + head_kv * value_strides[2]
    size = tl.cast(P, tl.int64) * HEADS * D
    shares += (segment * tl.num_programs(0) + tl.program_id(0)) * 2 * size
    first = tl.program_id(0) * steps * ROWS
    last = tl.minimum(first + steps * ROWS, count)
    col = tl.arange(0, DIMS)
    for start in range(0, P, COLS):
        tl.debug_barrier()  # dquery is added to again, by other threads
        j = start + tl.arange(0, COLS)
        held = j < n
        drawn = (segment.to(tl.int64) * P + j) * HEADS + head_kv
        drawn_v = drawn + tl.cast(BATCH, tl.int64) * P * HEADS
        key_row, value_row = j * key_strides[1], j * value_strides[1]
        k = prefix_tile(key, key_row, held, 0, D, seed, drawn, threshold, DROPOUT, ALIGNED, DIMS)
        v = prefix_tile(
            value, value_row, held, 0, D, seed, drawn_v, threshold, DROPOUT, ALIGNED, DIMS
        )
        dk = tl.zeros((DIMS, COLS), tl.float32)
        dv = tl.zeros((DIMS, COLS), tl.float32)
        end = tl.where((start < n) | ((start == 0) & FRESH), last, first)
        for r0 in tl.range(first, end, ROWS, num_stages=1):
            r = r0 + tl.arange(0, ROWS)
            valid = r < last
            b, head, token = place(r, segment, head_kv, T, REPEAT)
            x_row = offset(b, head, token, query_strides)
            upper_row = offset(b, head, token, dout_strides)
            bias_row = offset(b, head, token, bias_strides)
            x = row_tile(query, x_row, valid, 0, D, DIMS)
            upper = row_tile(dout, upper_row, valid, 0, D, DIMS)
            merged = row_tile(out, offset(b, head, token, out_strides), valid, 0, D, DIMS)
            # Zeroed where it is zero: a product that is summed at once would be fused into the sum,
            # and differently in each of the lanes that add it up.
            delta = tl.where(valid[:, None], upper.to(tl.float32) * merged.to(tl.float32), 0.0)
            delta = tl.sum(delta, axis=1)
            at_lse = lse + (b * HEADS * REPEAT + head) * T + token
            sums = tl.load(at_lse, mask=valid, other=float("inf"))
            scores = products(
                x, query, x_row, valid, k, key, key_row, held, D, seed, drawn, threshold,
                DROPOUT, ALIGNED, TERMS, DIMS, CHUNK,
            )  # fmt: skip
            scores = masked_scores(
                scores, scale * factor, bias, bias_row, bias_strides[3], j, token, valid, n, window,
                position, BIAS, WINDOW,
            )  # fmt: skip
            p = tl.exp(scores - sums[:, None])
            dp = products(
                upper, dout, upper_row, valid, v, value, value_row, held, D, seed, drawn_v,
                threshold, DROPOUT, ALIGNED, TERMS, DIMS, CHUNK,
            )  # fmt: skip
            ds = p * (dp * factor - delta[:, None])
            if NEED_DQUERY:
                added = tl.zeros((ROWS, DIMS), tl.float32)
                added = _dq(ds, k, added, query.dtype.element_ty, TERMS) * (scale * factor)
                at = dquery + offset(b, head, token, dquery_strides)[:, None] + col[None, :]
                inside = valid[:, None] & (col < D)[None, :]
                added += tl.load(at, mask=inside & ((start > 0) | (not FRESH)), other=0.0)
                tl.store(at, added.to(dquery.dtype.element_ty), mask=inside)
            if NEED_DPREFIX:
                dv = dot_wide(tl.trans(upper), p, dv, TERMS)
                dk = dot_wide(tl.trans(x), ds, dk, TERMS)
        if NEED_DPREFIX:
            if DROPOUT:
                word = tl.load(seed)
                kept = keep_mask(word, drawn, 0, D, threshold, DIMS, ALIGNED)
                dk = tl.where(tl.trans(kept), dk, 0.0)
                kept = keep_mask(word, drawn_v, 0, D, threshold, DIMS, ALIGNED)
                dv = tl.where(tl.trans(kept), dv, 0.0)
            at = shares + (j.to(tl.int64) * HEADS + head_kv)[None, :] * D + col[:, None]
            inside = (j < P)[None, :] & (col < D)[:, None]
            tl.store(at, dk * (scale * factor), mask=inside)
            tl.store(at + size, dv * factor, mask=inside)


class Tiles(NamedTuple):
    rows: int
    cols: int
    dims: int
    chunk: int
    warps: int
    apart: bool  # dquery by a launch of its own


def tiles(query: torch.dtype, d: int, p: int, n_terms: int, plain: bool, arch: int) -> Tiles:
    """Chosen so that nothing spills. p: how many keys a prefix has; plain: see Options.

    Warps lie along the rows, 16 for each: with fewer, several warps compute the same scores. From
    64 rows on sm_90 multiplies by groups of warps, whose operands take more registers.
    """
    dims = rank_block(d)
    if n_terms == 0 or query == torch.float32:  # FMA
        return Tiles(16, 16, dims, 16, 4 if dims <= 64 else 8, False)
    wide = min(32, rank_block(p))
    if dims <= 64:
        many = plain and (arch != 90 or n_terms == 1 or query == torch.bfloat16)
        return Tiles(64 if many else 32, wide if n_terms == 1 else 16, dims, dims, 4, False)
    if dims == 128 and n_terms == 1:
        return Tiles(32, wide, dims, dims, 8, False)
    if dims == 128:
        return (
            Tiles(16, 16, dims, dims, 8, not plain)
            if arch == 90
            else Tiles(128, 16, dims, 64, 8, True)
        )
    rows, chunk = (16, 32) if n_terms > 1 else (32, 64)
    return Tiles(rows, 16, dims, chunk, 8, True)


def _launches(need_dquery: bool, need_dprefix: bool, apart: bool) -> list[tuple[bool, bool]]:
    if need_dquery and need_dprefix and apart:
        return [(True, False), (False, True)]
    return [(need_dquery, need_dprefix)]


Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def launch_prefix_attend_backward(
    dout: torch.Tensor,
    query: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    options: Options,
    dquery: torch.Tensor | None,
    need_dquery: bool,
    need_dprefix: bool,
    *,
    arch: int = 80,
) -> Gradients:
    """(dquery like query, dprefix_key and dprefix_value [G, P, Hkv, D] like theirs), None each.

    dout, out: like query; dquery: what is added to in place, or None; lse: contiguous. The others
    as they went forward.
    """
    batch, heads, t, d = query.shape
    p, heads_kv = prefix_key.shape[1:3]
    fresh = need_dquery and dquery is None
    if fresh:
        dquery = torch.empty(batch, t, heads, d, dtype=query.dtype, device=query.device)
        dquery = dquery.transpose(1, 2)
    dkey, dvalue = (
        torch.empty(like.shape, dtype=like.dtype, device=query.device) if need_dprefix else None
        for like in (prefix_key, prefix_value)
    )
    if query.numel() == 0 or p == 0:
        for tensor in (dquery if fresh else None, dkey, dvalue):
            if tensor is not None:
                tensor.zero_()
        return dquery, dkey, dvalue
    n_terms = terms(prefix_key, query.dtype, arch)
    shape = tiles(query.dtype, d, p, n_terms, options.plain, arch)
    segments = batch if options.by_row else 1
    count = query.numel() // (d * heads_kv * segments)
    parts, steps = splits(heads_kv * segments, triton.cdiv(count, shape.rows))
    shares = lse
    if need_dprefix:
        size = segments * parts, 2, p * heads_kv * d
        shares = torch.empty(size, dtype=torch.float32, device=query.device)
    added = query if dquery is None else dquery
    bias, rows, lengths, seed = options.tensors(lse)
    for of_query, of_prefix in _launches(need_dquery, need_dprefix, shape.apart):
        _prefix_attend_backward[(parts, heads_kv, segments)](
            dout,
            query,
            prefix_key,
            prefix_value,
            out,
            lse,
            added,
            shares,
            bias,
            rows,
            lengths,
            seed,
            count,
            steps,
            t,
            d,
            p,
            heads // heads_kv,
            heads_kv,
            batch,
            dout.stride()[:3],
            query.stride()[:3],
            prefix_key.stride()[:3],
            prefix_value.stride()[:3],
            out.stride()[:3],
            added.stride()[:3],
            options.bias_strides(),
            *options.numbers(),
            **options.flags(d),
            NEED_DQUERY=of_query,
            NEED_DPREFIX=of_prefix,
            FRESH=of_query and fresh,
            TERMS=n_terms,
            ROWS=shape.rows,
            COLS=shape.cols,
            DIMS=shape.dims,
            CHUNK=shape.chunk,
            num_warps=shape.warps,
            enable_fp_fusion=True,
            num_stages=1,
        )
    if dkey is not None and dvalue is not None:
        sum_prefix(shares, options.rows, parts, dkey, dvalue)
    return dquery, dkey, dvalue
