"""The LoRA linear layer and its gradients, in plain PyTorch.

    s = drop(x) A^T                              [M, r]
    y = x W^T + bias + scaling (s B^T + lora_bias)
    ds = scaling dy B                            [M, r]
    dB = scaling dy^T s      dA = ds^T drop(x)      dx = dy W + drop'(ds A)

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


def _dense(weight: torch.Tensor | QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(dtype) if isinstance(weight, torch.Tensor) else dequantize_4bit(weight, dtype)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K], weight [N, K], lora_A [r, K], lora_B [N, r] -> (y [M, N] as x, s [M, r])."""
    acc = accumulate_dtype(x.dtype)
    x_acc = x.to(acc)
    s = dropout(x_acc, dropout_p, seed) @ lora_A.to(acc).T
    y = x_acc @ _dense(weight, acc).T + scaling * (s @ lora_B.to(acc).T)
    if bias is not None:
        y += bias.to(acc)
    if lora_bias is not None:
        y += scaling * lora_bias.to(acc)
    return y.to(x.dtype), s


def lora_linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    s: torch.Tensor,
    scaling: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dx in x's dtype, dA and dB in their parameter's dtype); None where not needed."""
    acc = accumulate_dtype(x.dtype)
    dy_acc, x_acc = dy.to(acc), x.to(acc)
    ds = scaling * (dy_acc @ lora_B.to(acc))
    dx = dA = dB = None
    if need_dx:
        dx = dy_acc @ _dense(weight, acc) + dropout(ds @ lora_A.to(acc), dropout_p, seed)
        dx = dx.to(x.dtype)
    if need_dA:
        dA = (ds.T @ dropout(x_acc, dropout_p, seed)).to(lora_A.dtype)
    if need_dB:
        dB = (scaling * (dy_acc.T @ s)).to(lora_B.dtype)
    return dx, dA, dB
