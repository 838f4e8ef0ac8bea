"""multi_lora_linear on a GPU, by Triton: as many launches for many adapters as for one.

The products with a narrow result are one launch each for all adapters, a program of which is of one
adapter and the rows that it serves. The adapters' parts are what the base matmul starts from, where
that is Triton's, or are added to its result in one launch more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from fusetune.ops import _cuda, _gpu_linear, _triton
from fusetune.ops._gpu_choice import Problem, Ways, choose
from fusetune.ops._lora_linear_gpu import sum_biases
from fusetune.ops._registry import Impl
from fusetune.ops._weight import Weight
from fusetune.quantized_weight import QuantizedWeight
from fusetune.reference import multi_lora_linear as reference
from fusetune.reference.dropout import threshold_and_scale

if TYPE_CHECKING:
    from fusetune._triton._adapters import Plan
    from fusetune._triton.linear import Tails

Tensor = torch.Tensor


def _plan(
    lora_A: Sequence[Tensor],
    scaling: Sequence[float],
    adapter_of: Sequence[int] | None,
    dropout_p: Sequence[float],
) -> Plan:
    from fusetune._triton._adapters import make_plan

    return make_plan(
        None if adapter_of is None else tuple(adapter_of),
        tuple(a.shape[0] for a in lora_A),
        tuple(scaling),
        tuple(threshold_and_scale(p) for p in dropout_p),
        lora_A[0].device,
    )


def _joined(factors: Sequence[Tensor]) -> Tensor:
    """All of them, one after the other, in the widest of their dtypes."""
    flat = [_triton.adapter(factor).flatten() for factor in factors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _split(
    joined: Tensor | None, like: Sequence[Tensor], need: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients that lie one after the other, each in its parameter's dtype."""
    if joined is None:
        return [None] * len(like)
    parts = joined.split([parameter.numel() for parameter in like])
    return [
        part.view(parameter.shape).to(parameter.dtype) if needed else None
        for part, parameter, needed in zip(parts, like, need, strict=True)
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
    (m, k), n = x.shape, weight.shape[0]
    if m == 0 or n == 0 or k == 0:
        return reference.multi_lora_linear(
            x, weight, lora_A, lora_B, scaling, adapter_of, bias, lora_bias, dropout_p, seeds
        )
    from fusetune._triton.linear import Tails
    from fusetune._triton.multi_lora_linear import launch_multi_shrink

    plan = _plan(lora_A, scaling, adapter_of, dropout_p)
    bias32 = sum_biases(bias, None, 1.0)
    if not plan.most:
        return _gpu_linear.linear(x, weight, bias32), x.new_empty(0, dtype=torch.float32)
    with _triton.on(x.device):
        arch = _triton.capability(x.device)
        s = launch_multi_shrink(x, _joined(lora_A), plan, seeds, arch=arch)
    biases = None if lora_bias is None else _triton.adapter(lora_bias).float()
    tails = Tails(s, _joined(lora_B), plan, lora_bias=biases)
    return _product(x, weight, bias32, tails), s


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
    (m, n), k = dy.shape, x.shape[1]
    if m == 0 or n == 0 or k == 0:
        return reference.multi_lora_linear_backward(
            dy, x, weight, lora_A, lora_B, s, scaling, adapter_of, dropout_p, seeds,
            need_dx, need_dA, need_dB,
        )  # fmt: skip
    from fusetune._triton._tile import terms
    from fusetune._triton.linear import Tails
    from fusetune._triton.multi_lora_linear import launch_multi_da, launch_multi_ds_db

    plan = _plan(lora_A, scaling, adapter_of, dropout_p)
    if not plan.most:
        dx = _gpu_linear.linear_dx(dy, weight) if need_dx else None
        return dx, _zeros(lora_A, need_dA), _zeros(lora_B, need_dB)
    a, b = _joined(lora_A), _joined(lora_B)
    dA, dB = (
        torch.empty_like(like) if any(need) else None for like, need in ((a, need_dA), (b, need_dB))
    )
    with _triton.on(dy.device):
        arch = _triton.capability(dy.device)
        ds = launch_multi_ds_db(dy, b, s.contiguous(), plan, dB, arch=arch)
        if dA is not None:
            launch_multi_da(x, ds, plan, seeds, dA, terms=terms(a, x.dtype, arch))
    dx = None
    if need_dx:
        dx = _product(dy, weight, None, Tails(ds, a, plan, True, None, seeds))
    return dx, _split(dA, lora_A, need_dA), _split(dB, lora_B, need_dB)


def _zeros(like: Sequence[Tensor], need: Sequence[bool]) -> list[Tensor | None]:
    return [
        torch.zeros_like(one) if needed else None for one, needed in zip(like, need, strict=True)
    ]


def _product(rows: Tensor, weight: Weight, bias: Tensor | None, tails: Tails) -> Tensor:
    """rows W^T + bias, or rows W for dX, and the adapters' parts: as `_gpu_linear` chooses."""
    m, (n, k) = rows.shape[0], weight.shape

    def added_to(base: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: _with_tails(None, None, None, tails, base())

    ways: Ways = {}
    if _gpu_linear.cuda_takes(m, n, k, rows.dtype, weight, dx=tails.dx):
        assert isinstance(weight, QuantizedWeight)
        packed = weight
        if tails.dx:
            ways["cuda"] = added_to(lambda: _cuda.linear_4bit_dx(rows, packed, None, None))
        else:
            ways["cuda"] = added_to(lambda: _cuda.linear_4bit(rows, packed, bias, None))
    if _gpu_linear.triton_multiplies(rows, weight):
        ways["triton"] = lambda: _with_tails(rows, _facing(rows, weight, tails), bias, tails)
    ways["addmm"] = added_to(lambda: _matmul(rows, _facing(rows, weight, tails), bias))
    rank, masked = sum(tails.plan.ranks), tails.seeds is not None
    what = "dx" if tails.dx else "y"
    return choose(Problem(what, m, n, k, rank, rows.dtype, rows.device, masked, True), ways)()


def _facing(rows: Tensor, weight: Weight, tails: Tails) -> Tensor:
    """The weight, decoded, with the inner dimension last."""
    dense = _gpu_linear.dense(weight, rows)
    return dense.T if tails.dx else dense


def _matmul(rows: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    y = rows @ w.T
    return y if bias is None else y.add_(bias)


def _with_tails(
    rows: Tensor | None,
    w: Tensor | None,
    bias: Tensor | None,
    tails: Tails,
    y: Tensor | None = None,
) -> Tensor:
    """rows w^T + bias and the adapters' parts; or y with these added in place."""
    from fusetune._triton.linear import launch_linear

    if y is None:
        assert rows is not None
        assert w is not None
        y = torch.empty(rows.shape[0], w.shape[0], dtype=rows.dtype, device=rows.device)
    with _triton.on(y.device):
        arch = _triton.capability(y.device)
        launch_linear(rows, w, y, arch=arch, tails=tails, bias=bias)
    return y


GPU_FORWARD = Impl("triton", _forward, _triton.supports, 20)
GPU_BACKWARD = Impl("triton", _backward, _triton.supports, 20)
