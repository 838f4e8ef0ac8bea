"""bottleneck on the native CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fusetune.ops import _cpu
from fusetune.ops._registry import Impl
from fusetune.reference.bottleneck import ACTIVATIONS

Tensor = torch.Tensor
ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
_NONE = (0, 0, 0)  # no matrix


def _matrix(tensor: Tensor | None) -> tuple[int, int, int]:
    return _NONE if tensor is None else _cpu.matrix(tensor)


def _weight(weight: Tensor) -> Tensor:
    return weight.detach().resolve_neg().contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _adapters(
    down: Tensor,
    up: Tensor,
    rows: Sequence[int],
    activation: str,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> tuple[Any, ...]:
    """The kernels' description of G adapters. down, up: contiguous; biases: fp32, contiguous."""
    d, h = down.shape[1:]
    down_matrix = (down.data_ptr(), h, _cpu.DTYPE_CODES[down.dtype])
    up_matrix = (up.data_ptr(), d, _cpu.DTYPE_CODES[up.dtype])
    biases = (_address(down_bias), _address(up_bias))
    return h, d, list(rows), down_matrix, up_matrix, *biases, ACTIVATION_CODES[activation]


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
    m, h = x.shape
    down, up = _weight(down_weight), _weight(up_weight)
    b_down = None if down_bias is None else _cpu.fp32(down_bias)
    b_up = None if up_bias is None else _cpu.fp32(up_bias)
    if residual is not None and residual.dtype == torch.float64:
        residual = residual.float()
    y, z = _cpu.empty(m, h, dtype=x.dtype), _cpu.empty(m, down.shape[1], dtype=x.dtype)
    _cpu.kernels().bottleneck(
        _cpu.matrix(x),
        m,
        _adapters(down, up, rows, activation, b_down, b_up),
        _matrix(x if same else residual),
        _cpu.dropout(dropout_p, seed),
        _cpu.matrix(y),
        _cpu.matrix(z),
    )
    return y, z


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
    m, h = x.shape
    down, up = _weight(down_weight), _weight(up_weight)
    groups, d, _ = down.shape
    shapes = (
        ((m, h), x.dtype),
        (down.shape, down.dtype),
        ((groups, d), torch.float32),
        (up.shape, up.dtype),
        ((groups, h), torch.float32),
    )
    grads = [
        _cpu.empty(*shape, dtype=dtype) if needed else None
        for (shape, dtype), needed in zip(shapes, need, strict=True)
    ]
    dx, d_down, d_down_bias, d_up, d_up_bias = grads
    _cpu.kernels().bottleneck_backward(
        _cpu.matrix(dy),
        _cpu.matrix(x),
        _cpu.matrix(z.contiguous()),
        m,
        _adapters(down, up, rows, activation),
        _matrix(dy if same else None),
        _cpu.dropout(dropout_p, seed),
        _matrix(dx),
        _matrix(None if d_down is None else d_down.view(-1, h)),
        _matrix(None if d_up is None else d_up.view(-1, d)),
        _address(d_down_bias),
        _address(d_up_bias),
    )
    return tuple(grads)


CPU_FORWARD = Impl("cpu", _forward, _cpu.supports("bottleneck"), 10)
CPU_BACKWARD = Impl("cpu", _backward, _cpu.supports("bottleneck_backward"), 10)
