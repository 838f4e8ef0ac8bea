"""Bottleneck adapters and their gradients, in plain PyTorch.

    z = x down_weight^T + down_bias              [M, d]
    y = residual + drop(f(z) up_weight^T + up_bias)

    du = drop'(dy)                               [M, H]
    d_up_weight = du^T f(z)      d_up_bias = sum du
    dz = (du up_weight) f'(z)                    [M, d]
    d_down_weight = dz^T x       d_down_bias = sum dz
    dx = dz down_weight (+ dy where x itself is the residual)

drop multiplies by a mask that depends on (seed, position) only; drop' multiplies by the same mask.
Weights and biases have a leading G: group g of them serves the g-th run of rows.
Houlsby et al. 2019 (arXiv:1902.00751), Pfeiffer et al. 2020 (arXiv:2005.00247).
"""

import math
from collections.abc import Callable, Sequence

import torch

from fusetune.reference.dropout import dropout
from fusetune.reference.linear_4bit import accumulate_dtype

Tensor = torch.Tensor

LEAKY_SLOPE = 0.01
_TANH_SCALE = math.sqrt(2 / math.pi)
_TANH_CUBE = 0.044715


def _gelu_derivative(z: Tensor) -> Tensor:
    density = (-0.5 * z * z).exp() / math.sqrt(2 * math.pi)
    return 0.5 * torch.erfc(-z / math.sqrt(2)) + z * density


def _gelu_new(z: Tensor) -> Tensor:
    return torch.nn.functional.gelu(z, approximate="tanh")


def _gelu_new_derivative(z: Tensor) -> Tensor:
    t = torch.tanh(_TANH_SCALE * (z + _TANH_CUBE * z**3))
    slope = _TANH_SCALE * (1 + 3 * _TANH_CUBE * z * z)
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * slope


def _silu_derivative(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _sigmoid_derivative(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s)


Function = Callable[[Tensor], Tensor]

# Name: (f, f'). "gelu" is the exact one, by erf; "gelu_new" its approximation by tanh.
ACTIVATIONS: dict[str, tuple[Function, Function]] = {
    "relu": (torch.relu, lambda z: (z > 0).to(z.dtype)),
    "gelu": (torch.nn.functional.gelu, _gelu_derivative),
    "gelu_new": (_gelu_new, _gelu_new_derivative),
    "silu": (torch.nn.functional.silu, _silu_derivative),
    "tanh": (torch.tanh, lambda z: 1 - torch.tanh(z) ** 2),
    "leakyrelu": (
        lambda z: torch.where(z > 0, z, LEAKY_SLOPE * z),
        lambda z: torch.where(z > 0, torch.ones_like(z), LEAKY_SLOPE),
    ),
    "sigmoid": (torch.sigmoid, _sigmoid_derivative),
    "identity": (lambda z: z, torch.ones_like),
}


def bottleneck(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    rows: Sequence[int],
    activation: str,
    residual: Tensor | None,
    same: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x [M, H], down_weight [G, d, H], down_bias [G, d], up_weight [G, H, d], up_bias [G, H].

    rows: how many rows of x each of the G groups serves; sums to M. residual [M, H]; `same`: x is
    the residual. Returns y [M, H] as x, and z [M, d], fp32 for fp32 and else of x's dtype.
    """
    acc = accumulate_dtype(x.dtype)
    f, _ = ACTIVATIONS[activation]
    z = _grouped(x.to(acc), down_weight.to(acc).mT, rows)
    if down_bias is not None:
        z = z + _per_row(down_bias.to(acc), rows)
    u = _grouped(f(z), up_weight.to(acc).mT, rows)
    if up_bias is not None:
        u = u + _per_row(up_bias.to(acc), rows)
    y = dropout(u, dropout_p, seed)
    added = x if same else residual
    if added is not None:
        y = y + added.to(acc)
    return y.to(x.dtype), z.to(x.dtype)


def bottleneck_backward(
    dy: Tensor,
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    z: Tensor,
    rows: Sequence[int],
    activation: str,
    same: bool,
    dropout_p: float,
    seed: Tensor | None,
    need: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """(dx, d_down_weight, d_down_bias, d_up_weight, d_up_bias), None where not needed.

    `need`: which of the five are. dx is of x's dtype, those of weights of theirs, those of biases
    of the dtype of sums, fp32 or float64.
    """
    acc = accumulate_dtype(x.dtype)
    f, derivative = ACTIVATIONS[activation]
    dy, z = dy.to(acc), z.to(acc)
    du = dropout(dy, dropout_p, seed)
    dx = d_down_weight = d_down_bias = d_up_weight = d_up_bias = None
    if need[3]:
        d_up_weight = _outer(du, f(z), rows).to(up_weight.dtype)
    if need[4]:
        d_up_bias = _sums(du, rows)
    if any(need[:3]):
        dz = _grouped(du, up_weight.to(acc), rows) * derivative(z)
        if need[0]:
            dx = _grouped(dz, down_weight.to(acc), rows)
            dx = (dx + dy if same else dx).to(x.dtype)
        if need[1]:
            d_down_weight = _outer(dz, x.to(acc), rows).to(down_weight.dtype)
        if need[2]:
            d_down_bias = _sums(dz, rows)
    return dx, d_down_weight, d_down_bias, d_up_weight, d_up_bias


def _grouped(left: Tensor, right: Tensor, rows: Sequence[int]) -> Tensor:
    """left [M, a] times right [G, a, b], group by group: [M, b]."""
    return torch.cat([part @ right[g] for g, part in enumerate(left.split(list(rows)))])


def _per_row(bias: Tensor, rows: Sequence[int]) -> Tensor:
    """bias [G, n] as [M, n], each group's repeated for its rows."""
    return torch.cat([bias[g].expand(count, -1) for g, count in enumerate(rows)])


def _outer(left: Tensor, right: Tensor, rows: Sequence[int]) -> Tensor:
    """left^T right of each group: [G, a, b]."""
    parts = zip(left.split(list(rows)), right.split(list(rows)), strict=True)
    return torch.stack([a.T @ b for a, b in parts])


def _sums(rows_of: Tensor, rows: Sequence[int]) -> Tensor:
    """The sum over each group's rows: [G, n]."""
    return torch.stack([part.sum(0) for part in rows_of.split(list(rows))])
