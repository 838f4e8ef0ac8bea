"""What ops are measured against where no library has them: the same in torch's own operators.

Their arguments are the ops', so that they can stand in the ops' place in a whole model too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch.nn import functional

from fusetune import ops
from fusetune.reference.bottleneck import ACTIVATIONS

Tensor = torch.Tensor


def bottleneck(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    activation: str = "relu",
    scaling: float | Tensor = 1.0,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """An adapter's branch as two linear layers, in the weights' dtype; without groups of rows."""
    hidden = functional.linear(x.to(down_weight.dtype), down_weight, down_bias)
    branch = functional.linear(ACTIVATIONS[activation][0](hidden), up_weight, up_bias)
    if isinstance(scaling, Tensor) or scaling != 1:
        branch = branch * scaling
    if training and dropout_p:
        branch = functional.dropout(branch, dropout_p)
    return (branch if residual is None else branch + residual).to(x.dtype)


def adapter_fusion(
    query: Tensor,
    values: Sequence[Tensor],
    query_weight: Tensor,
    query_bias: Tensor | None,
    key_weight: Tensor,
    key_bias: Tensor | None,
    value_weight: Tensor,
    *,
    temperature: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    residual: Tensor | None = None,
    return_attention: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Keys and values of every adapter projected, as AdapterHub does it."""
    stack = torch.stack(list(values)).movedim(0, -2)  # [..., N, H]
    q = functional.linear(query, query_weight, query_bias)
    k, v = functional.linear(stack, key_weight, key_bias), functional.linear(stack, value_weight)
    scores = torch.matmul(q.unsqueeze(-2), k.transpose(-2, -1))
    if training and dropout_p:
        scores = functional.dropout(scores, dropout_p)
    if temperature != 1:
        scores = scores / temperature
    p = scores.softmax(-1)
    out = torch.matmul(p, v).squeeze(-2)
    out = out if residual is None else out + residual
    return (out, p.squeeze(-2).detach()) if return_attention else out


@contextmanager
def in_place_of_ops() -> Iterator[None]:
    """Methods that call these ops run the compositions instead, for the length of a with block."""
    with (
        mock.patch.object(ops, "bottleneck", bottleneck),
        mock.patch.object(ops, "adapter_fusion", adapter_fusion),
    ):
        yield
