"""Attention over N adapters' outputs, row by row: scores, softmax and the weighted sum in one pass.

Tiling: a program has ROWS rows with all of their columns in registers, and goes over the adapters
one by one; the next one's rows are asked for before this one's are worked on. Forward the softmax
is carried along: what is summed so far is rescaled whenever a score tops the largest before.
Backward the sum that every score's gradient needs, D = sum_j p_j dp_j, is known only at the end. It
enters linearly: dg = sum_i c_i p_i dp_i v_i - D sum_i c_i p_i v_i has both sums carried along, and
dvalues does not need the values. dp is counted from the first adapter's: nothing large cancels.

Bytes, for values of o bytes an element: N M H o of values, M H of g and of ctx, 4 M N of p;
backward the values, g, dctx and p once more, and as much written as gradients. Nothing twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fusetune._triton._tile import keep_mask, signed

MOST_COLS = 8192  # of a row that a program holds in registers
MOST_STACKS = 16  # tensors of values in one launch
_EACH = 32  # elements of a tile that a thread holds: 16-bit ones forward, and all others
_EACH_ELSE = 16


@triton.jit
def _column(table, i, SLOTS: tl.constexpr):
    """table[:, i], of [ROWS, SLOTS]."""
    return tl.sum(tl.where(tl.arange(0, SLOTS)[None, :] == i, table, 0.0), axis=1)


@triton.jit
def _factors(seed, row, N, threshold, factor, SLOTS: tl.constexpr):
    """What dropout multiplies the scores of these rows by: 0 or the factor."""
    kept = keep_mask(tl.load(seed), row, 0, N, threshold, SLOTS, False)
    return tl.where(kept, factor, 0.0)


@triton.jit
def _attend(
    g,
    values,
    counts,
    row_strides,
    strides,
    offset,
    seed,
    ctx,
    p,
    M,
    H,
    N,
    stride_g,
    inverse,
    threshold,
    factor,
    OFFSET: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col, slot = tl.arange(0, COLS), tl.arange(0, SLOTS)
    valid = row < M
    inside = valid[:, None] & (col < H)[None, :]
    query = tl.load(g + row[:, None] * stride_g + col[None, :], mask=inside, other=0.0)
    query = query.to(tl.float32)
    shift = tl.zeros((ROWS,), tl.float32)
    if OFFSET:
        shift = tl.load(offset + row, mask=valid, other=0.0)
    factors = tl.zeros((ROWS, SLOTS), tl.float32)
    if DROPOUT:
        factors = _factors(seed, row, N, threshold, factor, SLOTS)
    scores = tl.full((ROWS, SLOTS), float("-inf"), tl.float32)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    done = 0
    for s in tl.static_range(len(values)):
        at = values[s] + row[:, None] * row_strides[s] + col[None, :]
        after = tl.load(at, mask=inside, other=0.0)
        for i in range(counts[s]):
            value = after.to(tl.float32)
            at += strides[s]
            after = tl.load(at, mask=inside & (i + 1 < counts[s]), other=0.0)
            score = tl.sum(query * value, axis=1) + shift
            if DROPOUT:
                score *= _column(factors, done + i, SLOTS)
            score *= inverse
            scores = tl.where(slot[None, :] == done + i, score[:, None], scores)
            top = tl.maximum(largest, score)
            rescale, weight = tl.exp(largest - top), tl.exp(score - top)
            total = total * rescale + weight
            acc = acc * rescale[:, None] + weight[:, None] * value
            largest = top
        done += counts[s]
    weights = tl.exp(scores - largest[:, None]) / total[:, None]
    at = p + row[:, None] * N + slot[None, :]
    tl.store(at, weights, mask=valid[:, None] & (slot < N)[None, :])
    out = (acc / total[:, None]).to(ctx.dtype.element_ty)
    tl.store(ctx + row[:, None] * H + col[None, :], out, mask=inside)


@triton.jit
def _attend_backward(
    dctx,
    g,
    values,
    counts,
    row_strides,
    strides,
    p,
    seed,
    dg,
    dvalues,
    doffset,
    M,
    H,
    N,
    stride_d,
    stride_g,
    inverse,
    threshold,
    factor,
    NEED_DVALUES: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col, slot = tl.arange(0, COLS), tl.arange(0, SLOTS)
    valid = row < M
    inside = valid[:, None] & (col < H)[None, :]
    upper = tl.load(dctx + row[:, None] * stride_d + col[None, :], mask=inside, other=0.0)
    upper = upper.to(tl.float32)
    weights = tl.load(
        p + row[:, None] * N + slot[None, :],
        mask=valid[:, None] & (slot < N)[None, :],
        other=0.0,
    )
    scaled = weights * inverse  # c p
    if DROPOUT:
        scaled *= _factors(seed, row, N, threshold, factor, SLOTS)
    first = tl.zeros((ROWS,), tl.float32)
    mean = tl.zeros((ROWS,), tl.float32)
    dots = tl.zeros((ROWS, SLOTS), tl.float32)
    with_dots = tl.zeros((ROWS, COLS), tl.float32)
    without = tl.zeros((ROWS, COLS), tl.float32)
    done = 0
    for s in tl.static_range(len(values)):
        at = values[s] + row[:, None] * row_strides[s] + col[None, :]
        after = tl.load(at, mask=inside, other=0.0)
        for i in range(counts[s]):
            value = after.to(tl.float32)
            at += strides[s]
            after = tl.load(at, mask=inside & (i + 1 < counts[s]), other=0.0)
            dot = tl.sum(upper * value, axis=1)
            first = tl.where(done + i == 0, dot, first)
            dot -= first
            dots = tl.where(slot[None, :] == done + i, dot[:, None], dots)
            mean += _column(weights, done + i, SLOTS) * dot
            part = _column(scaled, done + i, SLOTS)[:, None] * value
            without += part
            with_dots += part * dot[:, None]
        done += counts[s]
    dquery = (with_dots - mean[:, None] * without).to(dg.dtype.element_ty)
    tl.store(dg + row[:, None] * H + col[None, :], dquery, mask=inside)
    dscores = scaled * (dots - mean[:, None])
    # Zeroed where they are zero: a product that is summed at once would be fused into the sum, and
    # differently in each of the lanes that add it up.
    dscores = tl.where((slot < N)[None, :], dscores, 0.0)
    tl.store(doffset + row, tl.sum(dscores, axis=1), mask=valid)
    if NEED_DVALUES:
        query = tl.load(g + row[:, None] * stride_g + col[None, :], mask=inside, other=0.0)
        query = query.to(tl.float32)
        done = 0
        for s in tl.static_range(len(values)):
            at = dvalues[s] + row[:, None] * H + col[None, :]
            for i in range(counts[s]):
                weight = _column(weights, done + i, SLOTS)[:, None]
                dscore = _column(dscores, done + i, SLOTS)[:, None]
                out = (weight * upper + dscore * query).to(dvalues[s].dtype.element_ty)
                tl.store(at, out, mask=inside)
                at += tl.cast(M, tl.int64) * H
            done += counts[s]


def _tiles(h: int, each: int) -> tuple[int, int, int]:
    """(ROWS, COLS, warps): a warp has whole rows as long as they fit its registers.

    A lane has two columns at least, see `dscores` for why.
    """
    cols = max(64, triton.next_power_of_2(h))
    return max(1, 32 * each // cols), cols, max(1, cols // (32 * each))


def _described(
    values: Sequence[torch.Tensor],
) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(stacks, adapters, strides of rows, strides of adapters) as the kernels take them."""
    if len(values) > MOST_STACKS:
        values = [torch.cat(list(values))]
    return (
        tuple(values),
        tuple(part.shape[0] for part in values),
        tuple(part.stride(1) for part in values),
        tuple(part.stride(0) for part in values),
    )


def launch_fusion_attend(
    g: torch.Tensor,
    values: Sequence[torch.Tensor],
    offset: torch.Tensor | None,
    temperature: float,
    seed: torch.Tensor | None = None,
    threshold: int = 0,
    factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ctx [M, H] like g and p, fp32 [M, N], of softmax(drop(g . values_i + offset) / temperature).

    g: [M, H], H at most MOST_COLS, and values: stacks [n, M, H] of N adapters in all; rows
    contiguous, fp32, fp16 or bf16; offset: fp32 [M], contiguous. seed: int64 [1]; scores whose word
    is below threshold (32 bits) are zeroed, the others multiplied by the factor. More than
    MOST_STACKS stacks are copied into one.
    """
    (m, h), n = g.shape, sum(part.shape[0] for part in values)
    ctx = torch.empty(m, h, dtype=g.dtype, device=g.device)
    p = torch.empty(m, n, dtype=torch.float32, device=g.device)
    if m == 0:
        return ctx, p
    narrow = values[0].element_size() == 2
    rows, cols, warps = _tiles(h, _EACH if narrow else _EACH_ELSE)
    _attend[(triton.cdiv(m, rows),)](
        g,
        *_described(values),
        p if offset is None else offset,
        p if seed is None else seed,
        ctx,
        p,
        m,
        h,
        n,
        g.stride(0),
        1 / temperature,
        signed(threshold),
        factor,
        OFFSET=offset is not None,
        DROPOUT=seed is not None,
        ROWS=rows,
        COLS=cols,
        SLOTS=max(4, triton.next_power_of_2(n)),
        num_warps=warps,
        enable_fp_fusion=True,
    )
    return ctx, p


def launch_fusion_attend_backward(
    dctx: torch.Tensor,
    g: torch.Tensor,
    values: Sequence[torch.Tensor],
    p: torch.Tensor,
    temperature: float,
    need_dvalues: bool,
    seed: torch.Tensor | None = None,
    threshold: int = 0,
    factor: float = 1.0,
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """(dg like g, dvalues like values or empty, doffset fp32 [M]); arguments as they went forward.

    dctx: [M, H], rows contiguous; p: what came out, contiguous.
    """
    (m, h), n = g.shape, p.shape[1]
    dg = torch.empty(m, h, dtype=g.dtype, device=g.device)
    doffset = torch.empty(m, dtype=torch.float32, device=g.device)
    stacks, *shapes = _described(values)
    dstacks = [torch.empty(part.shape, dtype=part.dtype, device=g.device) for part in stacks]
    rows, cols, warps = _tiles(h, _EACH_ELSE)
    if m:
        _attend_backward[(triton.cdiv(m, rows),)](
            dctx,
            g,
            stacks,
            *shapes,
            p,
            p if seed is None else seed,
            dg,
            tuple(dstacks) if need_dvalues else stacks,
            doffset,
            m,
            h,
            n,
            dctx.stride(0),
            g.stride(0),
            1 / temperature,
            signed(threshold),
            factor,
            NEED_DVALUES=need_dvalues,
            DROPOUT=seed is not None,
            ROWS=rows,
            COLS=cols,
            SLOTS=max(4, triton.next_power_of_2(n)),
            num_warps=warps,
            enable_fp_fusion=True,
        )
    if not need_dvalues:
        return dg, [], doffset
    if len(dstacks) < len(values):
        return dg, list(dstacks[0].split([part.shape[0] for part in values])), doffset
    return dg, dstacks, doffset
