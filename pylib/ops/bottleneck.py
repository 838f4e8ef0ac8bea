"""bottleneck: y = residual + drop(scaling (f(x W_d^T + b_d) W_u^T + b_u)), an adapter's branch.

The scaling is multiplied into the small W_u and b_u before the op, so that kernels know none and
its gradient follows from that of W_u.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusetune.ops import _check
from fusetune.ops._bottleneck import branch
from fusetune.reference import bottleneck as reference
from fusetune.reference.dropout import new_seed

Tensor = torch.Tensor

ACTIVATIONS = tuple(reference.ACTIVATIONS)


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
    rows: Sequence[int] | None = None,
) -> Tensor:
    """The branch of a bottleneck adapter (Houlsby et al. 2019, Pfeiffer et al. 2020), in one pass.

    x, residual: [..., H]; down_weight: [d, H]; down_bias: [d]; up_weight: [H, d]; up_bias: [H]. All
    float16, bfloat16, float32 or float64, not necessarily the same. activation: one of
    ACTIVATIONS; "gelu" is by erf, "gelu_new" by tanh, "leakyrelu" has slope 0.01. scaling: a
    number, or a tensor of no dimension, of [1] or, one for each channel, of [H]. A residual that is
    x itself costs nothing. With `training` and dropout_p > 0, the branch is dropped out before the
    residual is added, with a seed from torch's generator.

    rows: None, or how many rows of x (flattened to [M, H]) each of G adapters serves, one after the
    other. Weights and biases then have a leading G, and a tensor scaling may have.
    Returns y [..., H] in x's dtype; sums are taken in fp32 (float64 for a float64 x).

    Differentiable, once, in every tensor. Raises TypeError or ValueError, naming the argument, for
    shapes, dtypes, devices or values that do not fit.
    """
    _check_arguments(x, down_weight, down_bias, up_weight, up_bias, residual, dropout_p, rows)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    up_weight, up_bias = _fold(scaling, x, up_weight, up_bias, rows)
    same = residual is x
    if same:
        residual = None
    seed = new_seed(x.device) if training and dropout_p > 0 else None
    groups = None if rows is None else list(rows)
    parameters = (down_weight, down_bias, up_weight, up_bias)
    return branch(x, *parameters, groups, activation, residual, same, dropout_p, seed)


def _check_arguments(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
    dropout_p: float,
    rows: Sequence[int] | None,
) -> None:
    _check.check_float("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape [..., H] with H > 0, got {list(x.shape)}")
    h = x.shape[-1]
    lead: tuple[int, ...] = ()
    if rows is not None:
        lead = (len(rows),)
        if not rows or not all(isinstance(n, int) and n >= 0 for n in rows):
            raise ValueError(f"rows must be numbers of rows, none of them negative, got {rows}")
        m = x.shape[:-1].numel()
        if sum(rows) != m:
            raise ValueError(f"rows must sum to the {m} rows of x, got {rows}")
    _check.check_float("down_weight", down_weight)
    if down_weight.dim() != 2 + len(lead) or down_weight.shape[-2] == 0:
        wanted = ", ".join([*map(str, lead), "d", str(h)])
        raise ValueError(
            f"down_weight must have shape [{wanted}] with d > 0, got {list(down_weight.shape)}"
        )
    d = down_weight.shape[-2]
    others: tuple[tuple[str, Tensor | None, tuple[int, ...]], ...] = (
        ("down_weight", down_weight, (*lead, d, h)),
        ("up_weight", up_weight, (*lead, h, d)),
        ("down_bias", down_bias, (*lead, d)),
        ("up_bias", up_bias, (*lead, h)),
        ("residual", residual, tuple(x.shape)),
    )
    for name, tensor, shape in others:
        if tensor is not None:
            _check.check_float(name, tensor)
            _check.check_shape(name, tensor, shape)
            _check.check_device(name, tensor, x)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")


def _fold(
    scaling: float | Tensor,
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    rows: Sequence[int] | None,
) -> tuple[Tensor, Tensor | None]:
    """up_weight and up_bias times the scaling, in fp32 (float64 for a float64 x)."""
    if not isinstance(scaling, Tensor):
        if not isinstance(scaling, float | int):
            raise TypeError(f"scaling must be a number or a tensor, got {type(scaling).__name__}")
        if scaling == 1:
            return up_weight, up_bias
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    per_row = scaling
    if isinstance(scaling, Tensor):
        _check.check_float("scaling", scaling)
        _check.check_device("scaling", scaling, x)
        h = up_weight.shape[-2]
        allowed: list[tuple[int, ...]] = [(), (1,), (h,)]
        if rows is not None:
            allowed += [(len(rows), 1), (len(rows), h)]
        if tuple(scaling.shape) not in allowed:
            raise ValueError(f"scaling must have one of the shapes {allowed}, got {scaling.shape}")
        scaling = scaling.to(acc)
        per_row = scaling.unsqueeze(-1) if scaling.dim() else scaling
    return up_weight.to(acc) * per_row, None if up_bias is None else up_bias.to(acc) * scaling
