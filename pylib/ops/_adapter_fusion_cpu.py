"""fusion_attend on the native CPU kernels: of all rows at once, or of a block of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusetune.ops import _cpu
from fusetune.ops._registry import Impl

Tensor = torch.Tensor
_NONE = (0, 0, 0)  # no matrix


def _addresses(stacks: Sequence[Tensor], first_row: int) -> list[int]:
    """Of row first_row of each adapter: by arithmetic, as views of rows cost more for every one."""
    return [
        stack.data_ptr() + (i * stack.stride(0) + first_row * stack.stride(1)) * stack.itemsize
        for stack in stacks
        for i in range(len(stack))
    ]


def _matrices(stacks: Sequence[Tensor], first_row: int) -> list[tuple[int, int, int]]:
    """The kernels' description of each adapter's rows from first_row."""
    kinds = [
        (stack.stride(1), _cpu.DTYPE_CODES[stack.dtype])
        for stack in stacks
        for _ in range(len(stack))
    ]
    return [
        (address, *kind) for address, kind in zip(_addresses(stacks, first_row), kinds, strict=True)
    ]


def forward(
    g: Tensor,
    values: Sequence[Tensor],
    offset: Tensor | None,
    temperature: float,
    dropout_p: float,
    seed: Tensor | None,
    first_row: int = 0,
) -> tuple[Tensor, Tensor]:
    """(ctx, p) as reference.fusion_attend, of values' rows from first_row that belong to g's."""
    m, h = g.shape
    matrices = _matrices(values, first_row)
    ctx = _cpu.empty(m, h, dtype=g.dtype)
    p = _cpu.empty(m, len(matrices), dtype=torch.float32)
    shift = None if offset is None else _cpu.fp32(offset)
    _cpu.kernels().fusion_attend(
        _cpu.matrix(g),
        m,
        h,
        matrices,
        0 if shift is None else shift.data_ptr(),
        temperature,
        _cpu.dropout(dropout_p, seed),
        first_row,
        _cpu.matrix(ctx),
        p.data_ptr(),
    )
    return ctx, p


def _backward(
    dctx: Tensor,
    g: Tensor,
    values: Sequence[Tensor],
    p: Tensor,
    temperature: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dvalues: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """(dg, dvalues, doffset) as reference.fusion_attend_backward."""
    parts = values if need_dvalues else []
    dvalues = [_cpu.empty(*part.shape, dtype=part.dtype) for part in parts]
    mask = (dropout_p, seed, 0)
    dg, doffset = _gradients(dctx, g, values, p, temperature, *mask, dvalues, None)
    return dg, dvalues, doffset


def block_backward(
    dctx: Tensor,
    g: Tensor,
    values: Sequence[Tensor],
    p: Tensor,
    temperature: float,
    dropout_p: float,
    seed: Tensor | None,
    first_row: int,
    dvalues: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dg, ctx, doffset) of a block of rows. Writes its part of dvalues, if any: like values.

    dctx, g and p are the block's own, values and dvalues have all rows: the block's are from
    first_row on. Without dvalues g is not read.
    """
    ctx = _cpu.empty(*dctx.shape, dtype=dctx.dtype)
    mask = (dropout_p, seed, first_row)
    dg, doffset = _gradients(dctx, g, values, p, temperature, *mask, dvalues, ctx)
    return dg, ctx, doffset


def _gradients(
    dctx: Tensor,
    g: Tensor,
    values: Sequence[Tensor],
    p: Tensor,
    temperature: float,
    dropout_p: float,
    seed: Tensor | None,
    first_row: int,
    dvalues: Sequence[Tensor],
    ctx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    m, h = dctx.shape
    dg, doffset = _cpu.empty(m, h, dtype=dctx.dtype), _cpu.empty(m, dtype=torch.float32)
    _cpu.kernels().fusion_attend_backward(
        _cpu.matrix(dctx),
        _cpu.matrix(g),
        m,
        h,
        _matrices(values, first_row),
        p.data_ptr(),
        temperature,
        _cpu.dropout(dropout_p, seed),
        first_row,
        _cpu.matrix(dg),
        _NONE if ctx is None else _cpu.matrix(ctx),
        _addresses(dvalues, first_row),
        doffset.data_ptr(),
    )
    return dg, doffset


CPU_FORWARD = Impl("cpu", forward, _cpu.supports("fusion_attend"), 10)
CPU_BACKWARD = Impl("cpu", _backward, _cpu.supports("fusion_attend_backward"), 10)
