"""The narrow products of several LoRA adapters, each of the rows that it serves: the kernels of
lora_shrink, lora_ds_db and lora_da, a program of which is of one adapter.

Whatever the number of adapters, a product is one launch, and another one that adds the shares where
its loop is cut. A and B lie one adapter's after the other's: copied once where there are several.

Bytes: as for one adapter of these rows; where all serve all rows, x and dy are read once by each
adapter's programs, which for the shrink are neighbours and find x in the cache.
"""

from __future__ import annotations

import torch
import triton

from fusetune._triton import lora_da, lora_ds_db, lora_shrink
from fusetune._triton._adapters import Plan
from fusetune._triton._tile import PROGRAMS, rank_block, splits, sum_parts, terms

Tensor = torch.Tensor


def launch_multi_shrink(
    x: Tensor, lora_A: Tensor, plan: Plan, seeds: Tensor | None = None, *, arch: int = 80
) -> Tensor:
    """Every s = drop(x) A^T of the adapter's rows, fp32, one after the other: [plan.size * block].

    x: [M, K], rows contiguous, fp32, fp16 or bf16, neither M nor K 0; lora_A: every A [r, K], one
    after the other, any of these; seeds: int64 [adapters], or no dropout.
    """
    (m, k), adapters, block = x.shape, len(plan.ranks), len(x) // plan.entries
    flat = torch.empty(plan.size * block, dtype=torch.float32, device=x.device)
    if not flat.numel():
        return flat
    ranks, n_terms = rank_block(max(plan.ranks)), terms(lora_A, x.dtype, arch)
    quads = None if seeds is None else k % 4 == 0
    rows, cols, warps, stages = lora_shrink._tiles(x.dtype, 1, ranks, n_terms, quads)
    blocks = triton.cdiv(plan.most * block, rows)
    parts, steps = splits(blocks * adapters, triton.cdiv(k, cols))
    out = flat
    if parts > 1:
        out = torch.empty(parts, flat.numel(), dtype=torch.float32, device=x.device)
    lora_shrink._shrink[(blocks, parts, adapters)](
        x,
        *[lora_A] * lora_shrink.MOST,
        *[lora_A if seeds is None else seeds] * lora_shrink.MOST,
        plan.records,
        plan.served,
        out,
        m,
        k,
        *[0] * lora_shrink.MOST,
        x.stride(0),
        steps,
        0,
        1.0,
        block,
        flat.numel(),
        SEVERAL=True,
        COUNT=1,
        DROPOUT=seeds is not None,
        ALIGNED=bool(quads),
        TERMS=n_terms,
        ROWS=rows,
        COLS=cols,
        RANKS=ranks,
        num_warps=warps,
        enable_fp_fusion=True,
        num_stages=stages,
    )
    if parts > 1:
        sum_parts(out, flat)
    return flat


def launch_multi_ds_db(
    dy: Tensor, lora_B: Tensor, s: Tensor, plan: Plan, db: Tensor | None, *, arch: int = 80
) -> Tensor:
    """Every dS = scaling dY B, as s; every dB = scaling dY^T s is written to db, as lora_B lies.

    dy: [M, N], rows contiguous, neither 0; lora_B: every B [N, r], one after the other; s: as
    `launch_multi_shrink` gives it, not empty.
    """
    (m, n), adapters, block = dy.shape, len(plan.ranks), len(dy) // plan.entries
    ranks, n_terms = rank_block(max(plan.ranks)), terms(lora_B, dy.dtype, arch)
    rows, cols, warps = lora_ds_db._tiles(dy.dtype, ranks, n_terms)
    if n_terms == 0:  # FMA alone takes the registers that one adapter's rows leave
        rows = 16
    blocks = triton.cdiv(n, cols)
    programs = PROGRAMS // 2 if n_terms == 1 else PROGRAMS  # as for one adapter
    steps = triton.cdiv(plan.most * block, rows)
    parts, _ = splits(blocks * adapters, steps, programs)
    ds = torch.empty(s.numel(), dtype=torch.float32, device=dy.device)
    ds_parts = torch.empty(blocks, s.numel(), dtype=torch.float32, device=dy.device)
    db_parts = ds_parts
    if db is not None:
        db_parts = torch.empty(parts, db.numel(), dtype=torch.float32, device=dy.device)
    lora_ds_db._ds_db[(blocks, parts, adapters)](
        dy,
        lora_B,
        s,
        plan.records,
        plan.served,
        ds_parts,
        db_parts,
        m,
        n,
        0,
        dy.stride(0),
        0,
        block,
        s.numel(),
        sum(plan.ranks),
        SEVERAL=True,
        TERMS_B=n_terms,
        TERMS_S=n_terms,
        NEED_DB=db is not None,
        ROWS=rows,
        COLS=cols,
        RANKS=ranks,
        num_warps=warps,
        enable_fp_fusion=True,
        num_stages=1,
    )
    sum_parts(ds_parts, ds)
    if db is not None:
        sum_parts(db_parts, db)
    return ds


def launch_multi_da(
    x: Tensor, ds: Tensor, plan: Plan, seeds: Tensor | None, da: Tensor, *, terms: int
) -> None:
    """Every dA = dS^T drop(x) is written to da, one after the other.

    x: as in `launch_multi_shrink`; ds: fp32, of `launch_multi_ds_db`; terms: of a dS, see
    `dot_wide`.
    """
    (m, k), adapters, block = x.shape, len(plan.ranks), len(x) // plan.entries
    quads = None if seeds is None else k % 4 == 0
    ranks = rank_block(max(plan.ranks))
    rows, cols, warps, stages = lora_da._tiles(x.dtype, ranks, quads, terms, 1)
    blocks = triton.cdiv(k, cols)
    parts, _ = splits(blocks * adapters, triton.cdiv(plan.most * block, rows))
    shares = torch.empty(parts, da.numel(), dtype=torch.float32, device=x.device)
    lora_da._da[(blocks, parts, adapters)](
        x,
        *[ds] * lora_da.MOST,
        *[ds if seeds is None else seeds] * lora_da.MOST,
        plan.records,
        plan.served,
        shares,
        m,
        k,
        *[0] * lora_da.MOST,
        x.stride(0),
        0,
        0,
        block,
        sum(plan.ranks),
        SEVERAL=True,
        COUNT=1,
        DROPOUT=seeds is not None,
        ALIGNED=bool(quads),
        TERMS=terms,
        ROWS=rows,
        COLS=cols,
        RANKS=ranks,
        num_warps=warps,
        enable_fp_fusion=True,
        num_stages=stages,
    )
    sum_parts(shares, da)
