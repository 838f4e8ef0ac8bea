"""multi_lora_linear on the native CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

from fusetune.ops import _cpu
from fusetune.ops._lora_linear_cpu import base_dx, torch_multiplies, with_contiguous_rows
from fusetune.ops._registry import Impl
from fusetune.ops._weight import Weight
from fusetune.reference.dropout import threshold_and_scale

Tensor = torch.Tensor


class _Blocks(NamedTuple):
    """The rows of x that an adapter serves."""

    rows: int
    blocks: list[int] | None  # of `block` rows each; None: all rows
    block: int


def served(adapter_of: Sequence[int] | None, adapters: int, m: int) -> list[_Blocks]:
    """For each adapter the rows that it serves, of m; adapter_of as in the reference."""
    if adapter_of is None:
        return [_Blocks(m, None, 1)] * adapters
    blocks: list[list[int]] = [[] for _ in range(adapters)]
    for number, owner in enumerate(adapter_of):
        if owner >= 0:
            blocks[owner].append(number)
    block = m // len(adapter_of) if adapter_of else 0
    return [_Blocks(block * len(own), own, block) for own in blocks]


def _fp32(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float32 and tensor.is_contiguous() and not tensor.is_neg():
        return tensor  # `_cpu.fp32` takes as long as a small product
    return _cpu.fp32(tensor)


def _places(rows: Sequence[_Blocks], lora_A: Sequence[Tensor], flat: Tensor) -> list[int]:
    """The address of each adapter's part of all s or ds, [rows_i, r_i] one after the other."""
    address, places = flat.data_ptr(), []
    for own, a in zip(rows, lora_A, strict=True):
        places.append(address)
        address += own.rows * a.shape[0] * 4
    return places


def _size(rows: Sequence[_Blocks], lora_A: Sequence[Tensor]) -> int:
    return sum(own.rows * a.shape[0] for own, a in zip(rows, lora_A, strict=True))


def _dropouts(dropout_p: Sequence[float], seeds: Tensor | None) -> list[Any]:
    if seeds is None:
        return [None] * len(dropout_p)
    return [
        (seed, *threshold_and_scale(p)) if p else None
        for seed, p in zip(seeds.tolist(), dropout_p, strict=True)
    ]


def _forward(
    x: Tensor,
    weight: Weight,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    adapter_of: Sequence[int] | None,
    bias: Tensor | None,
    lora_bias: Tensor | None,
    dropout_p: Sequence[float],
    seeds: Tensor | None,
    int16: bool,
) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    n = weight.shape[0]
    all_a, all_b = [_fp32(a) for a in lora_A], [_fp32(b) for b in lora_B]
    biases = None if lora_bias is None else _fp32(lora_bias)
    rows = served(adapter_of, len(lora_A), m)
    s = _cpu.empty(_size(rows, all_a), dtype=torch.float32)
    places = _places(rows, all_a, s)
    drops = _dropouts(dropout_p, seeds)
    adapters = [
        (
            *(a.shape[0], *own, a.data_ptr(), b.data_ptr()),
            *(0 if biases is None else biases.data_ptr() + 4 * n * i, scaling[i], drops[i]),
            *(places[i], 0, 0, 0),
        )
        for i, (a, b, own) in enumerate(zip(all_a, all_b, rows, strict=True))
    ]
    _cpu.kernels().multi_lora_shrink(_cpu.matrix(x), k, adapters)
    y = _base(x, weight, bias, int16)
    _cpu.kernels().multi_lora_expand(_cpu.matrix(y), m, n, adapters, False)
    return y, s


def _base(x: Tensor, weight: Weight, bias: Tensor | None, int16: bool) -> Tensor:
    if isinstance(weight, Tensor) and torch_multiplies(x, weight):
        return linear(x, weight, None if bias is None else bias.to(x.dtype))
    bias32 = None if bias is None else _cpu.fp32(bias)
    return _cpu.linear(x, with_contiguous_rows(weight), weight.shape[0], bias32, None, int16)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Weight,
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
    (m, k), n = x.shape, dy.shape[1]
    all_a, all_b = [_fp32(a) for a in lora_A], [_fp32(b) for b in lora_B]
    rows = served(adapter_of, len(lora_A), m)
    s = s.contiguous()
    ds = _cpu.empty(s.numel(), dtype=torch.float32)
    dA = [_gradient(a, need) for a, need in zip(all_a, need_dA, strict=True)]
    dB = [_gradient(b, need) for b, need in zip(all_b, need_dB, strict=True)]
    drops = _dropouts(dropout_p, seeds)
    places = zip(_places(rows, all_a, s), _places(rows, all_a, ds), strict=True)
    adapters = [
        (
            *(a.shape[0], *own, a.data_ptr(), b.data_ptr(), 0, scale, drop, *place),
            *(0 if grad is None else grad.data_ptr() for grad in grads),
        )
        for a, b, own, scale, drop, place, *grads in zip(
            all_a, all_b, rows, scaling, drops, places, dA, dB, strict=True
        )
    ]
    c = _cpu.kernels()
    c.multi_lora_ds_db(_cpu.matrix(dy), n, adapters)
    if any(need_dA):
        c.multi_lora_da(_cpu.matrix(x), k, adapters)
    dx = None
    if need_dx:
        dx = base_dx(dy, weight)
        c.multi_lora_expand(_cpu.matrix(dx), m, k, adapters, True)
    return dx, _as(dA, lora_A), _as(dB, lora_B)


def _gradient(parameter: Tensor, need: bool) -> Tensor | None:
    return _cpu.empty(*parameter.shape, dtype=torch.float32) if need else None


def _as(grads: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor | None]:
    return [
        None if grad is None else grad.to(parameter.dtype)
        for grad, parameter in zip(grads, parameters, strict=True)
    ]


CPU_FORWARD = Impl(
    "cpu", _forward, _cpu.supports("multi_lora_shrink", "multi_lora_expand", "linear"), 10
)
CPU_BACKWARD = Impl(
    "cpu",
    _backward,
    _cpu.supports("multi_lora_ds_db", "multi_lora_da", "multi_lora_expand", "linear_dx"),
    10,
)
