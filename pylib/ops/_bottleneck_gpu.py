"""bottleneck on a GPU, by Triton: one launch forward; backward one, and one that adds its shares.

Wider bottlenecks than the kernels hold in registers (`most`) are two matmuls worth a library's:
torch runs them, as the reference does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusetune.ops import _triton
from fusetune.ops._registry import Case, Impl
from fusetune.reference import bottleneck as reference

Tensor = torch.Tensor


def _supports(case: Case) -> str | None:
    if (why := _triton.supports_mixed(case)) is not None:
        return why
    if (arch := _triton.capability()) < 80:
        return f"Triton has no matrix products on tensor cores for sm_{arch}, only from sm_80 on"
    return None


def too_wide(d: int, x: torch.dtype, weights: torch.dtype) -> str | None:
    """Why torch runs a bottleneck of d features, or None where the kernels do."""
    from fusetune._triton.bottleneck import most

    if d <= most(x, weights):
        return None
    return f"d = {d} is more than the {most(x, weights)} features that a Triton kernel holds"


def _weights(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Both as the kernels take them: of one dtype, the wider."""
    down, up = _triton.adapter(down), _triton.adapter(up)
    return (down, up) if down.dtype == up.dtype else (down.float(), up.float())


def _forward(
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
    from fusetune._triton.bottleneck import launch_bottleneck

    down, up = _weights(down_weight, up_weight)
    if too_wide(down.shape[1], x.dtype, down.dtype):
        return reference.bottleneck(
            x, down_weight, down_bias, up_weight, up_bias,
            rows, activation, residual, same, dropout_p, seed,
        )  # fmt: skip
    if residual is not None and residual.dtype not in _triton.DTYPES:
        residual = residual.float()
    with _triton.on(x.device):
        return launch_bottleneck(
            x,
            down,
            None if down_bias is None else _triton.adapter(down_bias),
            up,
            None if up_bias is None else _triton.adapter(up_bias),
            rows,
            activation,
            residual,
            same,
            seed,
            **_triton.mask(dropout_p, seed),
            arch=_triton.capability(x.device),
        )


def _backward(
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
    from fusetune._triton.bottleneck_backward import launch_bottleneck_backward

    down, up = _weights(down_weight, up_weight)
    if too_wide(down.shape[1], x.dtype, down.dtype):
        return reference.bottleneck_backward(
            dy, x, down_weight, up_weight, z, rows, activation, same, dropout_p, seed, need
        )
    with _triton.on(x.device):
        grads = launch_bottleneck_backward(
            dy,
            x,
            down,
            up,
            z,
            rows,
            activation,
            same,
            need[0],
            any(need[1:]),
            seed,
            **_triton.mask(dropout_p, seed),
            arch=_triton.capability(x.device),
        )
    acc = torch.float32
    dtypes = (x.dtype, down_weight.dtype, acc, up_weight.dtype, acc)
    return tuple(
        grad.to(dtype) if grad is not None and needed else None
        for grad, dtype, needed in zip(grads, dtypes, need, strict=True)
    )


GPU_FORWARD = Impl("triton", _forward, _supports, 20)
GPU_BACKWARD = Impl("triton", _backward, _supports, 20)
