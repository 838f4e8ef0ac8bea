"""The gradients of attention over N adapters' outputs: of g, of the values and of the offset.

Tiling: as forward, a program has ROWS rows and goes over the adapters one by one. The sum that
every score's gradient needs, D = sum_j p_j dp_j, is known only at the end. It enters linearly:
dg = sum_i c_i p_i dp_i v_i - D sum_i c_i p_i v_i has both sums carried along, and dvalues does not
need the values. dp is counted from the first adapter's: nothing large cancels.

Bytes, for values of o bytes an element: N M H o of values, M H of g and of dctx, 4 M N of p; and
written N M H o of dvalues, M H of dg, 4 M of doffset. Nothing twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fusetune._triton._tile import signed
from fusetune._triton.adapter_fusion import EACH_ELSE, column, described, dropout_factors, tiles


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
        scaled *= dropout_factors(seed, row, N, threshold, factor, SLOTS)
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
            mean += column(weights, done + i, SLOTS) * dot
            part = column(scaled, done + i, SLOTS)[:, None] * value
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
                weight = column(weights, done + i, SLOTS)[:, None]
                dscore = column(dscores, done + i, SLOTS)[:, None]
                out = (weight * upper + dscore * query).to(dvalues[s].dtype.element_ty)
                tl.store(at, out, mask=inside)
                at += tl.cast(M, tl.int64) * H
            done += counts[s]


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
    stacks, *shapes = described(values)
    dstacks = [torch.empty(part.shape, dtype=part.dtype, device=g.device) for part in stacks]
    rows, cols, warps = tiles(h, EACH_ELSE)
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
