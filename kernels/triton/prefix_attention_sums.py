"""The end of prefix attention's backward pass: shares of dK and dV of the prefixes, summed up.

Tiling: a program has BLOCK elements of one prefix's keys and values, and adds the shares of the
segments that have this prefix in their order: no atomics, always the same result.
Bytes, for R shares of prefixes of N elements, keys and values: 4 R N, and N written for each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 512


@triton.jit
def _sum_prefix(
    shares,
    rows,
    dkey,
    dvalue,
    n,
    segments,
    parts,
    ROWED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The shares of the segments that have one of the prefixes, added in their order."""
    group = tl.program_id(1)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dk, dv = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for segment in range(0, segments):
        has = group == 0
        if ROWED:
            has = tl.load(rows + segment) == group
        begin = segment * parts
        for part in range(begin, tl.where(has, begin + parts, begin)):
            at = shares + tl.cast(part, tl.int64) * 2 * n + i
            dk += tl.load(at, mask=i < n, other=0.0)
            dv += tl.load(at + n, mask=i < n, other=0.0)
    tl.store(dkey + group.to(tl.int64) * n + i, dk.to(dkey.dtype.element_ty), mask=i < n)
    tl.store(dvalue + group.to(tl.int64) * n + i, dv.to(dvalue.dtype.element_ty), mask=i < n)


def sum_prefix(
    shares: torch.Tensor,
    rows: torch.Tensor | None,
    parts: int,
    dkey: torch.Tensor,
    dvalue: torch.Tensor,
) -> None:
    """Writes dkey and dvalue, [G, P, Hkv, D], contiguous, any dtype.

    shares: fp32 [segments parts, 2, P Hkv D]. rows: int64 [segments], which prefix each segment
    has; None: all have the first.
    """
    groups, n = len(dkey), dkey[0].numel()
    _sum_prefix[(triton.cdiv(n, _BLOCK), groups)](
        shares,
        shares if rows is None else rows,
        dkey,
        dvalue,
        n,
        len(shares) // parts,
        parts,
        ROWED=rows is not None,
        BLOCK=_BLOCK,
        num_warps=4,
    )
