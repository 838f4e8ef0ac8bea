"""lora_linear_group on kernels: what is shared is x, read once for all, and dX, which is one.

Forward: every s from one pass over x where the device has such a kernel, then each base matmul with
its tail. Backward: dS and dB of each dY; every dA from one pass over x; dX from the first
projection, and the others added to it in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from fusetune.ops import _cpu, _gpu_linear, _lora_linear_cpu, _triton
from fusetune.ops._lora_linear_gpu import ByTriton, sum_biases
from fusetune.ops._registry import Case, Impl
from fusetune.reference.lora_linear_group import Need, Projection

Tensor = torch.Tensor


class _Parts(Protocol):
    """What a group is made of. rows, dy: matrices whose rows are contiguous."""

    @staticmethod
    def shrink(rows: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
        """s = drop(rows) lora_A^T of each, fp32 [M, r]."""
        ...

    @staticmethod
    def expand(rows: Tensor, projection: Projection, s: Tensor) -> Tensor:
        """y [M, N] in rows' dtype."""
        ...

    @staticmethod
    def ds_db(
        dy: Tensor, projection: Projection, s: Tensor, need_dB: bool
    ) -> tuple[Tensor, Tensor | None]:
        """dS fp32 [M, r], and dB in lora_B's dtype."""
        ...

    @staticmethod
    def da(rows: Tensor, projections: Sequence[Projection], ds: Sequence[Tensor]) -> list[Tensor]:
        """dA of each, in lora_A's dtype."""
        ...

    @staticmethod
    def dx(dy: Tensor, projection: Projection, ds: Tensor, to: Tensor | None) -> Tensor:
        """dX [M, K] in dy's dtype, or its part of `to`, added in place."""
        ...


def _forward(
    parts: _Parts, rows: Tensor, projections: Sequence[Projection]
) -> tuple[list[Tensor], list[Tensor]]:
    s = parts.shrink(rows, projections)
    return [parts.expand(rows, p, low) for p, low in zip(projections, s, strict=True)], s


def _backward(
    parts: _Parts,
    dys: Sequence[Tensor],
    rows: Tensor,
    projections: Sequence[Projection],
    s: Sequence[Tensor],
    need_dx: bool,
    needs: Sequence[Need],
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    ds, dB, dx = [], [], None
    for dy, projection, low, need in zip(dys, projections, s, needs, strict=True):
        low_ds, one_dB = parts.ds_db(dy, projection, low, need.lora_B)
        ds.append(low_ds)
        dB.append(one_dB)
        if need_dx:
            dx = parts.dx(dy, projection, low_ds, dx)
    dA: list[Tensor | None] = [None] * len(ds)
    wanted = [i for i, need in enumerate(needs) if need.lora_A]
    if wanted:
        found = parts.da(rows, [projections[i] for i in wanted], [ds[i] for i in wanted])
        for i, one_dA in zip(wanted, found, strict=True):
            dA[i] = one_dA
    return dx, list(zip(dA, dB, strict=True))


class _ByCpu:
    """A core has x in its cache for the next projection: each reads it for itself."""

    @staticmethod
    def shrink(rows: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
        return [
            _lora_linear_cpu.shrink(rows, _cpu.fp32(p.lora_A), p.dropout_p, p.seed)
            for p in projections
        ]

    @staticmethod
    def expand(rows: Tensor, projection: Projection, s: Tensor) -> Tensor:
        weight, _, lora_B, scaling, bias, lora_bias, _, _ = projection
        return _lora_linear_cpu.expand(rows, weight, s, lora_B, scaling, bias, lora_bias, False)

    @staticmethod
    def ds_db(
        dy: Tensor, projection: Projection, s: Tensor, need_dB: bool
    ) -> tuple[Tensor, Tensor | None]:
        lora_B = projection.lora_B
        ds, dB = _lora_linear_cpu.ds_db(dy, _cpu.fp32(lora_B), s, projection.scaling)
        return ds, dB.to(lora_B.dtype) if need_dB else None

    @staticmethod
    def da(rows: Tensor, projections: Sequence[Projection], ds: Sequence[Tensor]) -> list[Tensor]:
        return [
            _lora_linear_cpu.da(rows, low, p.dropout_p, p.seed).to(p.lora_A.dtype)
            for p, low in zip(projections, ds, strict=True)
        ]

    @staticmethod
    def dx(dy: Tensor, projection: Projection, ds: Tensor, to: Tensor | None) -> Tensor:
        dropout = _cpu.dropout(projection.dropout_p, projection.seed)
        a = _cpu.fp32(projection.lora_A)
        return _lora_linear_cpu.dx(dy, projection.weight, ds, a, dropout, to)


class _ByTriton:
    """Up to four A's of one dtype and dropout share a pass over x."""

    @staticmethod
    def shrink(rows: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
        from fusetune._triton.lora_shrink import launch_lora_shrink

        s: list[Tensor] = [rows] * len(projections)
        for together in _together(projections):
            some = [projections[i] for i in together]
            loras = [_triton.adapter(p.lora_A) for p in some]
            seeds = [p.seed for p in some if p.seed is not None] or None
            with _triton.on(rows.device):
                arch = _triton.capability(rows.device)
                mask = _triton.mask(some[0].dropout_p, some[0].seed)
                found = launch_lora_shrink(rows, loras, seeds, **mask, arch=arch)
            for i, low in zip(together, found, strict=True):
                s[i] = low
        return s

    @staticmethod
    def expand(rows: Tensor, projection: Projection, s: Tensor) -> Tensor:
        weight, _, lora_B, scaling, bias, lora_bias, _, _ = projection
        both = sum_biases(bias, lora_bias, scaling)
        return _gpu_linear.linear(rows, weight, both, (s, _triton.adapter(lora_B), scaling))

    @staticmethod
    def ds_db(
        dy: Tensor, projection: Projection, s: Tensor, need_dB: bool
    ) -> tuple[Tensor, Tensor | None]:
        lora_B = projection.lora_B
        dB = torch.empty(lora_B.shape, dtype=lora_B.dtype, device=dy.device) if need_dB else None
        return ByTriton.ds_db(dy, _triton.adapter(lora_B), s, projection.scaling, dB), dB

    @staticmethod
    def da(rows: Tensor, projections: Sequence[Projection], ds: Sequence[Tensor]) -> list[Tensor]:
        from fusetune._triton._tile import terms
        from fusetune._triton.lora_da import launch_lora_da

        outs = [torch.empty_like(p.lora_A, memory_format=_CONTIGUOUS) for p in projections]
        for together in _together(projections):
            some = [projections[i] for i in together]
            seeds = [p.seed for p in some if p.seed is not None] or None
            with _triton.on(rows.device):
                arch = _triton.capability(rows.device)
                launch_lora_da(
                    rows,
                    [ds[i] for i in together],
                    [outs[i] for i in together],
                    seeds,
                    **_triton.mask(some[0].dropout_p, some[0].seed),
                    terms=terms(_triton.adapter(some[0].lora_A), rows.dtype, arch),
                )
        return outs

    @staticmethod
    def dx(dy: Tensor, projection: Projection, ds: Tensor, to: Tensor | None) -> Tensor:
        weight, lora_A, *_, dropout_p, seed = projection
        mask = None if seed is None else (dropout_p, seed)
        return _gpu_linear.linear_dx(dy, weight, (ds, _triton.adapter(lora_A), 1.0), mask, to)


_CONTIGUOUS = torch.contiguous_format
_MOST = 4  # of one launch


def _together(projections: Sequence[Projection]) -> list[list[int]]:
    """The projections' numbers in runs that one launch takes: the kernels' limits."""
    runs: dict[tuple[object, ...], list[list[int]]] = {}
    for i, p in enumerate(projections):
        key = (p.lora_A.dtype, p.dropout_p if p.seed is not None else None)
        known = runs.setdefault(key, [[]])
        if len(known[-1]) == _MOST:
            known.append([])
        known[-1].append(i)
    return [run for known in runs.values() for run in known]


def _cpu_supports(case: Case) -> str | None:
    kernels = ("lora_shrink", "linear", "lora_ds_db", "lora_da", "linear_dx", "dropout")
    return _cpu.supports(*kernels)(case)


def _impls(function: Callable[..., Any]) -> tuple[Impl, Impl]:
    return (
        Impl("triton", partial(function, _ByTriton), _triton.supports, 20),
        Impl("cpu", partial(function, _ByCpu), _cpu_supports, 10),
    )


FORWARD = _impls(_forward)
BACKWARD = _impls(_backward)
