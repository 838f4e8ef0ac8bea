"""adapter_fusion on the CPU, a block of rows at a time.

    g = rows W_g^T + b_g
    p = softmax_i(drop(g . values_i + rows . u + c) / temperature)
    out = residual + (sum_i p_i values_i) W_v^T

The weighted sum, its gradient and that of g are as large as `rows`: no more than a block of each is
there at a time, and of g neither without a backward pass. Kept for that are what is given, p (one
number for each row and adapter) and g, where values need a gradient, which is all that asks for it.
To compute g again would cost one matmul more, beside the six there are. Instead its memory becomes
that of the gradient of rows, block after block, so that the backward pass makes nothing of this
size but results. (A second one over a retained graph does compute g again.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from fusetune.ops import _adapter_fusion_cpu, _cpu
from fusetune.ops._adapter_fusion import OP, with_contiguous_rows
from fusetune.ops._adapter_fusion_linear import Linear, product_dtype
from fusetune.ops._registry import plain
from fusetune.ops._weight import as_rows
from fusetune.reference import adapter_fusion as reference
from fusetune.reference.linear_4bit import accumulate_dtype

Tensor = torch.Tensor

# Weights are read, and their gradients read and written, for every block: with 512 rows a pass
# takes 3 % less, and 4.5 MiB more. Where g has 16 bits a block has twice as many rows, and as many
# bytes.
BLOCK_ROWS = 256


class Maps(NamedTuple):
    """Weights [out, in] and biases [out]. No weight: no map."""

    query_weight: Tensor | None  # W_g, [H, H]
    query_bias: Tensor | None
    score_weight: Tensor | None  # u, [1, H]
    score_bias: Tensor | None  # c, [1]
    value_weight: Tensor | None  # W_v, [H, H]


COUNT = len(Maps._fields)


class Options(NamedTuple):
    temperature: float
    dropout_p: float
    seed: Tensor | None


def in_blocks(rows: Tensor, maps: Maps, residual: Tensor | None, values: Sequence[Tensor]) -> bool:
    """Whether `fuse` is for these: eager, on the CPU, and of more than one block."""
    if rows.device.type != "cpu" or len(rows) <= BLOCK_ROWS or torch.compiler.is_compiling():
        return False
    if not all(t is None or plain(t) for t in (rows, *maps, residual, *values)):
        return False
    dtype = _query_dtype(rows, maps, values[0], _autocast_dtype())
    return OP.carrier("cpu", dtype, values[0].dtype) in _FORWARD


def fuse(
    rows: Tensor, maps: Maps, residual: Tensor | None, values: Sequence[Tensor], options: Options
) -> tuple[Tensor, Tensor]:
    """rows, residual [M, H], values: stacks [n, M, H] of N -> out [M, H] like values, p [M, N].

    Differentiable, once, in all tensors; p carries no gradient. Arguments are trusted.
    """
    trained = (rows, *maps, residual, *values)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained):
        out, p = _Fuse.apply(options, rows, residual, *maps, *values)
    else:
        out, p = _forward(rows, maps, residual, values, options, None)
    return out, p


def _blocks(m: int, dtype: torch.dtype) -> Iterator[slice]:
    rows = BLOCK_ROWS * max(1, 4 // dtype.itemsize)
    for first in range(0, m, rows):
        yield slice(first, min(first + rows, m))


def _autocast_dtype() -> torch.dtype | None:
    """Of matmuls, where autocast is on."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def _query_dtype(
    rows: Tensor, maps: Maps, values: Tensor, autocast: torch.dtype | None
) -> torch.dtype:
    """g's, for the attention: values' own, or that of p."""
    dtype = rows.dtype
    if maps.query_weight is not None:
        dtype = product_dtype(dtype, maps.query_weight.dtype, autocast)
    if dtype == values.dtype:
        return dtype
    return accumulate_dtype(torch.promote_types(dtype, values.dtype))


class _Steps:
    """The linear maps, and who carries out the attention between them.

    need: which tensors of maps need a gradient.
    """

    def __init__(
        self,
        rows: Tensor,
        maps: Maps,
        values: Tensor,
        autocast: torch.dtype | None,
        need: Sequence[bool] = (False,) * COUNT,
    ) -> None:
        def linear(x: torch.dtype, first: int, bias: Tensor | None) -> Linear | None:
            weight, needed = maps[first], (need[first], bias is not None and need[first + 1])
            if weight is None:
                return None
            return Linear(x, weight, bias, needed, autocast, self.carrier)

        self.dtype = _query_dtype(rows, maps, values, autocast)
        self.carrier = OP.carrier("cpu", self.dtype, values.dtype)
        self.query = linear(rows.dtype, 0, maps.query_bias)
        self.score = linear(rows.dtype, 2, maps.score_bias)
        self.value = linear(self.dtype, 4, None)

    def g(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """out: in self.dtype."""
        if self.query is None:
            return as_rows(x.to(self.dtype), x.shape[1])
        return self.query.forward(x, None, out).to(self.dtype)

    def offset(self, x: Tensor) -> Tensor | None:
        """x . u + c, a number for each row."""
        if self.score is None:
            return None
        return self.score.forward(x).squeeze(1).to(accumulate_dtype(self.dtype))


# --- forward ---- ---------------------------------------------------------------------------------

_FORWARD = {"cpu": _adapter_fusion_cpu.forward, "reference": reference.fusion_attend}


def _forward(
    rows: Tensor,
    maps: Maps,
    residual: Tensor | None,
    values: Sequence[Tensor],
    options: Options,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out, p). kept: where g is to be written, or None."""
    (m, h), dtype = rows.shape, values[0].dtype
    steps = _Steps(rows, maps, values[0], _autocast_dtype())
    out = _cpu.empty(m, h, dtype=dtype)
    p = _cpu.empty(m, sum(map(len, values)), dtype=accumulate_dtype(steps.dtype))
    attend, stacks = _FORWARD[steps.carrier], [with_contiguous_rows(part) for part in values]

    def attend_block(block: slice) -> None:  # a function, so that what it makes ends with it
        x = rows[block]
        g = steps.g(x, None if kept is None else kept[block])
        ctx, p[block] = attend(g, stacks, steps.offset(x), *options, block.start)
        addend = None if residual is None else residual[block]
        if steps.value is not None:
            steps.value.forward(ctx, addend, out[block])
        else:
            out[block] = ctx if addend is None else ctx + addend

    with torch.autocast("cpu", enabled=False):
        for block in _blocks(m, steps.dtype):
            attend_block(block)
    return out, p


# --- backward ---- --------------------------------------------------------------------------------


def _reference_backward(
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
    """As _adapter_fusion_cpu.block_backward."""
    dg, found, doffset = reference.fusion_attend_backward(
        dctx, g, values, p, temperature, dropout_p, seed, bool(dvalues), first_row
    )
    block = slice(first_row, first_row + len(g))
    for d, into in zip(found, dvalues, strict=True):
        into[:, block] = d
    stack = torch.cat([part[:, block].to(p.dtype) for part in values])
    return dg, torch.einsum("mn,nmh->mh", p, stack).to(dg.dtype), doffset


_BACKWARD = {"cpu": _adapter_fusion_cpu.block_backward, "reference": _reference_backward}


class _Fuse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, options: Options, rows: Tensor, residual: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        maps, values = Maps(*tensors[:COUNT]), tensors[COUNT:]
        ctx.options, ctx.autocast = options._replace(seed=None), _autocast_dtype()
        ctx.residual = None if residual is None else residual.dtype
        g = None
        if maps.query_weight is not None and any(ctx.needs_input_grad[3 + COUNT :]):
            dtype = _query_dtype(rows, maps, values[0], ctx.autocast)
            g = _cpu.empty(*rows.shape, dtype=dtype)
        out, p = _forward(rows, maps, residual, values, options, g)
        ctx.g_is_kept = g is not None
        ctx.save_for_backward(options.seed, p, g, rows, *tensors)
        ctx.mark_non_differentiable(p)
        return out, p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        seed, p, g, rows, *tensors = ctx.saved_tensors
        maps, values = Maps(*tensors[:COUNT]), tensors[COUNT:]
        _, need_rows, need_residual, *need = ctx.needs_input_grad
        need_values = any(need[COUNT:])
        g = g if ctx.g_is_kept else None
        drows = None
        if need_rows and g is not None and g.dtype == rows.dtype:
            # As .data, so that autograd does not refuse the saved tensor to a second backward pass
            # for having changed. That one makes no use of it.
            ctx.g_is_kept, drows = False, g.data
        elif need_rows:
            drows = _cpu.empty(*rows.shape, dtype=rows.dtype)
        dvalues = [_cpu.empty(*v.shape, dtype=v.dtype) for v in values if need_values]
        steps = _Steps(rows, maps, values[0], ctx.autocast, need)
        options = ctx.options._replace(seed=seed)
        with torch.autocast("cpu", enabled=False):
            _backward(dout, rows, g, values, p, options, steps, drows, dvalues)
        gradients: list[Tensor | None] = []
        for step in (steps.query, steps.score, steps.value):
            gradients += (None, None) if step is None else step.gradients()
        no_gradients = [None] * len(values)
        gradients[COUNT:] = dvalues or no_gradients
        return None, drows, dout.to(ctx.residual) if need_residual else None, *gradients


def _backward(
    dout: Tensor,
    rows: Tensor,
    g: Tensor | None,
    values: Sequence[Tensor],
    p: Tensor,
    options: Options,
    steps: _Steps,
    drows: Tensor | None,
    dvalues: list[Tensor],
) -> None:
    """Writes drows and dvalues, as far as they are there; the maps' gradients are in the steps.

    drows may be g's memory: what is read of a block of g is read before it is written.
    """
    attend, stacks = _BACKWARD[steps.carrier], [with_contiguous_rows(part) for part in values]

    def block_backward(block: slice) -> None:
        x, upper = rows[block], dout[block]
        dctx = upper if steps.value is None else steps.value.dx(upper)
        dctx = as_rows(dctx.to(steps.dtype), rows.shape[1])
        query = dctx  # not read where values need no gradient
        if dvalues:
            query = steps.g(x) if g is None else g[block]
        dg, ctx, doffset = attend(dctx, query, stacks, p[block], *options, block.start, dvalues)
        if steps.value is not None:
            steps.value.add_gradients(upper, ctx)
        if steps.query is not None:
            steps.query.add_gradients(dg, x)
        if steps.score is not None:
            steps.score.add_gradients(doffset.unsqueeze(1), x)
        if drows is None:
            return
        into = drows[block]
        if steps.query is not None:
            steps.query.dx(dg, into)
        else:
            into.copy_(dg)
        if steps.score is not None:
            into += steps.score.dx(doffset.unsqueeze(1))

    for block in _blocks(len(rows), steps.dtype):
        block_backward(block)
