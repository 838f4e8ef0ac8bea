"""Attention over N adapters' outputs, row by row: scores, softmax and the weighted sum in one pass.

Tiling: a program has ROWS rows with all of their columns in registers, and goes over the adapters
one by one; the next one's rows are asked for before this one's are worked on. The softmax is
carried along: what is summed so far is rescaled whenever a score tops the largest before.

Bytes, for values of o bytes an element: N M H o of values, M H of g and of ctx, 4 M N of p. Nothing
twice.
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
EACH_ELSE = 16


@triton.jit
def column(table, i, SLOTS: tl.constexpr):
    """table[:, i], of [ROWS, SLOTS]."""
    return tl.sum(tl.where(tl.arange(0, SLOTS)[None, :] == i, table, 0.0), axis=1)


@triton.jit
def dropout_factors(seed, row, N, threshold, factor, SLOTS: tl.constexpr):
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
        factors = dropout_factors(seed, row, N, threshold, factor, SLOTS)
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
                score *= column(factors, done + i, SLOTS)
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


def tiles(h: int, each: int) -> tuple[int, int, int]:
    """(ROWS, COLS, warps): a warp has whole rows as long as they fit its registers.

    A lane has two columns at least, see `dscores` of the backward pass for why.
    """
    cols = max(64, triton.next_power_of_2(h))
    return max(1, 32 * each // cols), cols, max(1, cols // (32 * each))


def described(
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
    rows, cols, warps = tiles(h, _EACH if narrow else EACH_ELSE)
    _attend[(triton.cdiv(m, rows),)](
        g,
        *described(values),
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
