"""The gradient of a bias that a layer has added already: the identity, with sums over rows.

For y = g(x) + b the gradient of b is the sum of dy over everything but b's own dimension, whatever
g is. The layer is given b detached, and so computes y as it would without training; autograd then
neither sums in 16 bits nor looks at the layer's weight.
"""

from __future__ import annotations

from typing import Any

import torch

from fusetune.ops._scale_columns import column_sums
from fusetune.ops._weight import as_rows

Tensor = torch.Tensor


def trained_bias(y: Tensor, bias: Tensor, dim: int = -1) -> Tensor:
    """y, with a gradient for `bias` [N] that was added along y's dimension `dim`, of size N.

    The sums are taken in fp32 (float64 for a float64 y), in an order that depends on the shape
    alone, and rounded to bias's dtype once. Differentiable any number of times.
    """
    if not (torch.is_grad_enabled() and bias.requires_grad):
        return y
    result: Tensor = _TrainedBias.apply(y, bias, dim)
    return result


class _TrainedBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor, dim: int) -> Tensor:
        ctx.dtype, ctx.dim = bias.dtype, dim
        return y.detach()  # not y itself: autograd would take the result for a view

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dbias = None
        if ctx.needs_input_grad[1]:
            last = dy.movedim(ctx.dim, -1)
            rows = as_rows(last, last.shape[-1])
            dbias = column_sums(rows).to(ctx.dtype)
            if ctx.dim in (-1, dy.dim() - 1):
                dy = rows.view(dy.shape)  # so that the layer need not copy it once more
        return dy if ctx.needs_input_grad[0] else None, dbias, None
