"""The linear layer under several LoRA adapters and its gradients, in plain PyTorch.

Adapter i serves the rows R_i of x: all of them, or those that `adapter_of` gives it.

    s_i = drop_i(x)[R_i] A_i^T                                   [|R_i|, r_i]
    y = x W^T + bias;  y[R_i] += scaling_i s_i B_i^T + lora_bias_i
    ds_i = scaling_i dy[R_i] B_i                                 [|R_i|, r_i]
    dB_i = scaling_i dy[R_i]^T s_i      dA_i = ds_i^T drop_i(x)[R_i]
    dx = dy W;  dx[R_i] += drop_i'(ds_i A_i)

Each drop_i has a seed of its own, and the mask of the whole x: it does not depend on the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fusetune.reference.dropout import dropout
from fusetune.reference.linear_4bit import accumulate_dtype
from fusetune.reference.lora_linear import _dense

if TYPE_CHECKING:
    from fusetune.quantized_weight import QuantizedWeight

Tensor = torch.Tensor


def served_rows(adapter_of: Sequence[int] | None, adapter: int, x: Tensor) -> Tensor:
    """The rows of x [M, K] that an adapter serves, ascending.

    adapter_of: the adapter of each block of rows, all of one size, or -1 for none; None: every
    adapter serves every row.
    """
    rows = torch.arange(x.shape[0], device=x.device)
    if adapter_of is None:
        return rows
    if not len(adapter_of):
        return rows[:0]
    mine = [b for b, owner in enumerate(adapter_of) if owner == adapter]
    return rows.view(len(adapter_of), -1)[mine].flatten()


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    adapter_of: Sequence[int] | None,
    bias: Tensor | None,
    lora_bias: Tensor | None,
    dropout_p: Sequence[float],
    seeds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x [M, K], weight [N, K], lora_A [r_i, K], lora_B [N, r_i], lora_bias [adapters, N], scaled
    -> (y [M, N] as x, all s_i, flattened, one after the other)."""
    acc = accumulate_dtype(x.dtype)
    x_acc = x.to(acc)
    y = x_acc @ _dense(weight, acc).T
    if bias is not None:
        y += bias.to(acc)
    all_s = [x_acc.new_empty(0)]
    for i, (a, b, scale) in enumerate(zip(lora_A, lora_B, scaling, strict=True)):
        rows = served_rows(adapter_of, i, x)
        s = _dropped(x_acc, dropout_p, seeds, i)[rows] @ a.to(acc).T
        y[rows] += scale * (s @ b.to(acc).T)
        if lora_bias is not None:
            y[rows] += lora_bias[i].to(acc)
        all_s.append(s.flatten())
    return y.to(x.dtype), torch.cat(all_s)


def multi_lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    s: Tensor,
    scaling: Sequence[float],
    adapter_of: Sequence[int] | None,
    dropout_p: Sequence[float],
    seeds: Tensor | None,
    need_dx: bool,
    need_dA: Sequence[bool],
    need_dB: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """(dx in x's dtype, each dA and dB in their parameter's dtype); None where not needed."""
    acc = accumulate_dtype(x.dtype)
    dy_acc, x_acc = dy.to(acc), x.to(acc)
    dx = dy_acc @ _dense(weight, acc) if need_dx else None
    dA: list[Tensor | None] = []
    dB: list[Tensor | None] = []
    first = 0
    for i, (a, b, scale) in enumerate(zip(lora_A, lora_B, scaling, strict=True)):
        rows = served_rows(adapter_of, i, x)
        own_s = s[first : first + len(rows) * len(a)].view(-1, len(a))
        first += own_s.numel()
        ds = scale * (dy_acc[rows] @ b.to(acc))
        if dx is not None:
            spread = torch.zeros_like(dx)
            spread[rows] = ds @ a.to(acc)
            dx += _dropped(spread, dropout_p, seeds, i)
        x_rows = _dropped(x_acc, dropout_p, seeds, i)[rows]
        dA.append((ds.T @ x_rows).to(a.dtype) if need_dA[i] else None)
        dB.append((scale * (dy_acc[rows].T @ own_s)).to(b.dtype) if need_dB[i] else None)
    return None if dx is None else dx.to(x.dtype), dA, dB


def _dropped(x: Tensor, dropout_p: Sequence[float], seeds: Tensor | None, adapter: int) -> Tensor:
    p = dropout_p[adapter]
    return x if seeds is None or p == 0 else dropout(x, p, seeds[adapter])
