"""The DoRA linear layer (Liu et al. 2024, arXiv:2402.09353) and its gradients, in plain PyTorch.

    c = magnitude / norm                         [N], norm = || W + scaling B A || by rows, detached
    z = x W^T + scaling (x A^T) B^T              [M, N]
    y = c z + bias

With dropout PEFT drops x for the whole of what DoRA adds to the base layer, which is
(c - 1) x W^T + c scaling (x A^T) B^T, and not only on its way to A; so does this:

    z = drop(x) W^T + scaling (drop(x) A^T) B^T
    y = (x - drop(x)) W^T + c z + bias

The same expectation as y without dropout, and without dropout the same formula.

    dz = c dy                                    [M, N]
    ds = scaling dz B                            [M, r]
    dB = scaling dz^T s      dA = ds^T drop(x)   s = drop(x) A^T
    dx = (1 - drop')(dy W) + drop'(dz W + ds A)
    dmagnitude = sum over rows of dy z / norm

drop multiplies by a mask that depends on (seed, position) only; drop' multiplies by the same mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fusetune.reference.dequantize_4bit import dequantize_4bit
from fusetune.reference.dropout import dropout
from fusetune.reference.linear_4bit import accumulate_dtype

if TYPE_CHECKING:
    from fusetune.quantized_weight import QuantizedWeight

Tensor = torch.Tensor


def dora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor,
    norm: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    keep_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K], weight [N, K], lora_A [r, K], lora_B [N, r], magnitude and norm [N].

    Returns y [M, N] as x, s [M, r], and z [M, N] as x, or empty unless keep_z.
    """
    acc = accumulate_dtype(x.dtype)
    x_acc, dense = x.to(acc), _dense(weight, acc)
    low = dropout(x_acc, dropout_p, seed)
    s = low @ lora_A.to(acc).T
    z = low @ dense.T + scaling * (s @ lora_B.to(acc).T)
    y = magnitude.to(acc) / norm.to(acc) * z
    if seed is not None:
        y += (x_acc - low) @ dense.T
    if bias is not None:
        y += bias.to(acc)
    return y.to(x.dtype), s, z.to(x.dtype) if keep_z else x.new_empty(0)


def _dense(weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if isinstance(weight, Tensor) else dequantize_4bit(weight, dtype)


def dora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor,
    norm: Tensor,
    s: Tensor,
    z: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
    need_dmagnitude: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB, dmagnitude), each in the dtype of what it is of; None where not needed."""
    acc = accumulate_dtype(x.dtype)
    dy_acc = dy.to(acc)
    dz = magnitude.to(acc) / norm.to(acc) * dy_acc
    ds = scaling * (dz @ lora_B.to(acc))
    dx = dA = dB = dmagnitude = None
    if need_dx:
        dense = _dense(weight, acc)
        dx = dropout(dz @ dense + ds @ lora_A.to(acc), dropout_p, seed)
        if seed is not None:
            base = dy_acc @ dense
            dx += base - dropout(base, dropout_p, seed)
        dx = dx.to(x.dtype)
    if need_dA:
        dA = (ds.T @ dropout(x.to(acc), dropout_p, seed)).to(lora_A.dtype)
    if need_dB:
        dB = (scaling * (dz.T @ s)).to(lora_B.dtype)
    if need_dmagnitude:
        dmagnitude = ((dy_acc * z.to(acc)).sum(0) / norm.to(acc)).to(magnitude.dtype)
    return dx, dA, dB, dmagnitude
