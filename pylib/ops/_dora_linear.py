"""dora_linear on the kernels of lora_linear.

Without dropout a pass over z and one over dy are added to what LoRA does; on a GPU only the latter.
With it the base product is made twice, as in PEFT: once of what is kept of x, once of the rest.
What is kept is exact in 16 bits, x or 0; the factor 1 / (1 - p) is applied to products.

c multiplies narrow products on the side of lora_B, so that dB is as exact as LoRA's; only the base
product's dz = c dy is rounded to dy's dtype.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch.nn.functional import linear

from fusetune.ops import _cpu, _gpu_linear, _lora_linear_cpu, _triton
from fusetune.ops._lora_linear_gpu import ByTriton
from fusetune.ops._registry import Impl
from fusetune.ops._weight import Weight
from fusetune.reference.dropout import threshold_and_scale

Tensor = torch.Tensor
Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class _Kernels(Protocol):
    """p, seed: of a dropout, or no seed."""

    @staticmethod
    def parameter(tensor: Tensor) -> Tensor:
        """lora_A or lora_B as the kernels take it."""
        ...

    @staticmethod
    def ds_db(dy: Tensor, lora_B: Tensor, s: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """dS = scaling dy lora_B [M, r] and scaling dy^T s [N, r], fp32."""
        ...

    @staticmethod
    def da(rows: Tensor, ds: Tensor, lora_A: Tensor, p: float, seed: Tensor | None) -> Tensor:
        """ds^T drop(rows), fp32."""
        ...

    @staticmethod
    def dx(dy: Tensor, weight: Weight, ds: Tensor, lora_A: Tensor) -> Tensor:
        """dy W + ds lora_A in dy's dtype."""
        ...

    @staticmethod
    def base_dx(dy: Tensor, weight: Weight) -> Tensor:
        """dy W in dy's dtype."""
        ...

    @staticmethod
    def keep(rows: Tensor, p: float, seed: Tensor) -> Tensor:
        """rows, with zeros where they are dropped."""
        ...


def _backward(
    kernels: _Kernels,
    dy: Tensor,
    rows: Tensor,
    weight: Weight,
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
) -> Grads:
    dx = dA = dB = dmagnitude = None
    if need_dmagnitude:
        dmagnitude = ((dy.float() * z).sum(0) / norm).to(magnitude.dtype)
    if not (need_dx or need_dA or need_dB):
        return dx, dA, dB, dmagnitude
    c = _factor(magnitude, norm)
    a = kernels.parameter(lora_A)
    scaled_b = lora_B.detach().float() * c[:, None]
    ds, dB = kernels.ds_db(dy, kernels.parameter(scaled_b), s, scaling)
    dB = (dB * c[:, None]).to(lora_B.dtype) if need_dB else None
    if need_dA:
        dA = kernels.da(rows, ds, a, dropout_p, seed).to(lora_A.dtype)
    if not need_dx:
        return dx, dA, dB, dmagnitude
    if seed is None:
        dx = kernels.dx((dy * c).to(dy.dtype), weight, ds, a)
        return dx, dA, dB, dmagnitude
    added = kernels.dx((dy * (c - 1)).to(dy.dtype), weight, ds, a)
    kept = kernels.keep(added, dropout_p, seed)
    dx = kernels.base_dx(dy, weight).add_(kept, alpha=threshold_and_scale(dropout_p)[1])
    return dx, dA, dB, dmagnitude


def _factor(magnitude: Tensor, norm: Tensor) -> Tensor:
    return (magnitude.detach() / norm).float()


# --- CPU ------------------------------------------------------------------------------------------


def _cpu_forward(
    rows: Tensor,
    weight: Weight,
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
    c, dtype = _factor(magnitude, norm), rows.dtype
    a, b = _cpu.fp32(lora_A), _cpu.fp32(lora_B)
    added, factor = bias, 1.0
    if seed is not None:
        factor = threshold_and_scale(dropout_p)[1]
        kept = _ByCpu.keep(rows, dropout_p, seed)
        added = _cpu_product(torch.sub(rows, kept, alpha=factor), weight, bias)
        rows = kept
    s = _lora_linear_cpu.shrink(rows, a, 0.0, None)
    z = _cpu_product(rows, weight, None, (s, b, scaling))
    if seed is not None:
        z, s = z.mul_(factor), s.mul_(factor)
    saved = z.to(dtype) if keep_z else rows.new_empty(0)
    target = None if saved is z else z
    y = (
        torch.mul(z, c, out=target)
        if added is None
        else torch.addcmul(added.detach(), c, z, out=target)
    )
    return y.to(dtype), s, saved


def _cpu_product(
    rows: Tensor,
    weight: Weight,
    bias: Tensor | None,
    tail: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """rows W^T + bias + scaling s lora_B^T, fp32; tail: (s, lora_B, scaling)."""
    n = weight.shape[0]
    low = None if tail is None else (tail[0].data_ptr(), tail[1].data_ptr(), tail[1].shape[1])
    low_rank = None if tail is None or low is None else (*low, tail[2])
    added = None if bias is None else _cpu.fp32(bias)
    if not (isinstance(weight, Tensor) and _lora_linear_cpu.torch_multiplies(rows, weight)):
        dense = _lora_linear_cpu.with_contiguous_rows(weight)
        return _cpu.linear(rows, dense, n, added, low_rank, False, torch.float32)
    y = linear(rows, weight).float()
    if tail is not None:
        y += _cpu.linear(tail[0][:, :0], weight, n, None, low_rank, False)
    return y if added is None else y.add_(added)


class _ByCpu:
    @staticmethod
    def parameter(tensor: Tensor) -> Tensor:
        return _cpu.fp32(tensor)

    @staticmethod
    def ds_db(dy: Tensor, lora_B: Tensor, s: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        return _lora_linear_cpu.ds_db(dy, lora_B, s, scaling)

    @staticmethod
    def da(rows: Tensor, ds: Tensor, lora_A: Tensor, p: float, seed: Tensor | None) -> Tensor:
        return _lora_linear_cpu.da(rows, ds, p, seed)

    @staticmethod
    def dx(dy: Tensor, weight: Weight, ds: Tensor, lora_A: Tensor) -> Tensor:
        return _lora_linear_cpu.dx(dy, weight, ds, lora_A, None)

    @staticmethod
    def base_dx(dy: Tensor, weight: Weight) -> Tensor:
        return _lora_linear_cpu.base_dx(dy, weight)

    @staticmethod
    def keep(rows: Tensor, p: float, seed: Tensor) -> Tensor:
        m, k = rows.shape
        kept = _cpu.empty(m, k, dtype=rows.dtype)
        mask = (int(seed), threshold_and_scale(p)[0], 1.0)
        _cpu.kernels().dropout(_cpu.matrix(rows), m, k, mask, _cpu.matrix(kept))
        return kept


# --- GPU ------------------------------------------------------------------------------------------


def _triton_forward(
    rows: Tensor,
    weight: Weight,
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
    a, b = _triton.adapter(lora_A), _triton.adapter(lora_B)
    c = _factor(magnitude, norm).contiguous()
    added = None if bias is None else _cpu.fp32(bias)
    z = rows.new_empty(rows.shape[0], b.shape[0]) if keep_z else None
    if seed is None:
        s = ByTriton.shrink(rows, a, 0.0, None)
        y = _gpu_linear.linear(rows, weight, added, (s, b, scaling), _gpu_linear.Scale(c, z))
    else:
        factor = threshold_and_scale(dropout_p)[1]
        kept, rest = (
            torch.empty(rows.shape, dtype=rows.dtype, device=rows.device) for _ in range(2)
        )
        _triton.dropout(rows, kept, dropout_p, seed, rest)
        y = _gpu_linear.linear(rest, weight, added)
        del rest
        s = ByTriton.shrink(kept, a, 0.0, None)
        scale = _gpu_linear.Scale(factor * c, z, y)
        y = _gpu_linear.linear(kept, weight, None, (s, b, scaling), scale)
        s = s.mul_(factor)
        z = None if z is None else z.mul_(factor)
    return y, s, rows.new_empty(0) if z is None else z


class _ByTriton:
    @staticmethod
    def parameter(tensor: Tensor) -> Tensor:
        return _triton.adapter(tensor)

    @staticmethod
    def ds_db(dy: Tensor, lora_B: Tensor, s: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        dB = torch.empty(lora_B.shape, dtype=torch.float32, device=dy.device)
        return ByTriton.ds_db(dy, lora_B, s, scaling, dB), dB

    @staticmethod
    def da(rows: Tensor, ds: Tensor, lora_A: Tensor, p: float, seed: Tensor | None) -> Tensor:
        dA = torch.empty(lora_A.shape, dtype=torch.float32, device=rows.device)
        ByTriton.da(rows, ds, lora_A, p, seed, dA)
        return dA

    @staticmethod
    def dx(dy: Tensor, weight: Weight, ds: Tensor, lora_A: Tensor) -> Tensor:
        return _gpu_linear.linear_dx(dy, weight, (ds, lora_A, 1.0))

    @staticmethod
    def base_dx(dy: Tensor, weight: Weight) -> Tensor:
        return _gpu_linear.linear_dx(dy, weight)

    @staticmethod
    def keep(rows: Tensor, p: float, seed: Tensor) -> Tensor:
        kept = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        _triton.dropout(rows, kept, p, seed)
        return kept


_NATIVE = _cpu.supports("linear", "linear_dx", "lora_shrink", "lora_ds_db", "lora_da", "dropout")
FORWARD = (
    Impl("triton", _triton_forward, _triton.supports, 20),
    Impl("cpu", _cpu_forward, _NATIVE, 10),
)
_by_triton: Any = partial(_backward, _ByTriton)
_by_cpu: Any = partial(_backward, _ByCpu)
BACKWARD = (
    Impl("triton", _by_triton, _triton.supports, 20),
    Impl("cpu", _by_cpu, _NATIVE, 10),
)
