"""A linear layer with IA3's vector l (Liu et al. 2022, arXiv:2205.05638, section 3.3).

Keys and values, whose outputs are scaled, with z = x W^T:

    y = l (z + bias)      = l z + l bias                  l [N]
    dx = (l dy) W         dl = sum over rows of dy z + bias sum over rows of dy
    dbias = l (sum over rows of dy)

Feed-forward layers, whose inputs are scaled (the activations of the paper's l_ff):

    y = (l x) W^T + bias                                  l [K]
    g = dy W              dx = l g
    dl = sum over rows of x g                             dbias = sum over rows of dy
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fusetune.reference.dequantize_4bit import dequantize_4bit
from fusetune.reference.linear_4bit import accumulate_dtype

if TYPE_CHECKING:
    from fusetune.quantized_weight import QuantizedWeight

Tensor = torch.Tensor


def ia3_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    scale: Tensor,
    bias: Tensor | None,
    feedforward: bool,
    keep_z: bool,
) -> tuple[Tensor, Tensor]:
    """x [M, K], weight [N, K], scale [K] for a feed-forward layer, else [N], bias [N].

    Returns y [M, N] and z [M, N], both as x; z is empty unless keep_z, and for feed-forward layers.
    """
    acc = accumulate_dtype(x.dtype)
    dense, factor = _dense(weight, acc), scale.to(acc)
    rows = x.to(acc)
    z = (factor * rows if feedforward else rows) @ dense.T
    y = z if feedforward else factor * z
    if bias is not None:
        y = y + (bias.to(acc) if feedforward else factor * bias.to(acc))
    kept = z.to(x.dtype) if keep_z and not feedforward else x.new_empty(0)
    return y.to(x.dtype), kept


def ia3_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | QuantizedWeight,
    scale: Tensor,
    bias: Tensor | None,
    z: Tensor,
    feedforward: bool,
    need_dx: bool,
    need_dscale: bool,
    need_dbias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dscale, dbias), each in the dtype of what it is of; None where not needed.

    x is read for feed-forward layers, z for the others.
    """
    acc = accumulate_dtype(dy.dtype)
    upper, factor = dy.to(acc), scale.to(acc)
    dx = dscale = dbias = None
    if feedforward:
        g = upper @ _dense(weight, acc) if need_dx or need_dscale else upper
        if need_dscale:
            assert x is not None
            dscale = (g * x.to(acc)).sum(0)
        dx = factor * g if need_dx else None
    else:
        dx = (factor * upper) @ _dense(weight, acc) if need_dx else None
        if need_dscale:
            dscale = (upper * z.to(acc)).sum(0)
            if bias is not None:
                dscale = dscale + bias.to(acc) * upper.sum(0)
    if need_dbias and bias is not None:
        dbias = (upper.sum(0) if feedforward else factor * upper.sum(0)).to(bias.dtype)
    return (
        None if dx is None else dx.to(dy.dtype),
        None if dscale is None else dscale.to(scale.dtype),
        dbias,
    )


def _dense(weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if isinstance(weight, Tensor) else dequantize_4bit(weight, dtype)
