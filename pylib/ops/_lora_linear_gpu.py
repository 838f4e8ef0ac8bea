"""lora_linear on a GPU: the narrow products by Triton, the base matmul by `_gpu_linear`.

On Turing Triton has no tensor cores: its narrow products, bound by memory elsewhere, are fp32 FMAs.
Where Triton cannot be used they are torch's, and "cuda" carries the op only if it is asked for by
name; otherwise LoRA layers run the library's own code.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch

from fusetune.ops import _cuda, _gpu_linear, _triton
from fusetune.ops._registry import Case, Impl, backend
from fusetune.ops._weight import Weight
from fusetune.reference.dropout import dropout

Tensor = torch.Tensor


class _Narrow(Protocol):
    """The products with one narrow result. p, seed: of a dropout, or no seed."""

    @staticmethod
    def shrink(rows: Tensor, lora_A: Tensor, p: float, seed: Tensor | None) -> Tensor:
        """s = drop(rows) lora_A^T, fp32 [M, r]."""
        ...

    @staticmethod
    def ds_db(dy: Tensor, lora_B: Tensor, s: Tensor, scaling: float, dB: Tensor | None) -> Tensor:
        """dS = scaling dy lora_B, fp32 [M, r]; dB = scaling dy^T s is written if it is given."""
        ...

    @staticmethod
    def da(
        rows: Tensor, ds: Tensor, lora_A: Tensor, p: float, seed: Tensor | None, dA: Tensor
    ) -> None:
        """dA = ds^T drop(rows) is written. lora_A: says in what precision."""
        ...


class ByTriton:
    @staticmethod
    def shrink(rows: Tensor, lora_A: Tensor, p: float, seed: Tensor | None) -> Tensor:
        from fusetune._triton.lora_shrink import launch_lora_shrink

        seeds = None if seed is None else [seed]
        with _triton.on(rows.device):
            arch = _triton.capability(rows.device)
            return launch_lora_shrink(rows, [lora_A], seeds, **_triton.mask(p, seed), arch=arch)[0]

    @staticmethod
    def ds_db(dy: Tensor, lora_B: Tensor, s: Tensor, scaling: float, dB: Tensor | None) -> Tensor:
        from fusetune._triton.lora_ds_db import launch_lora_ds_db

        ds = torch.empty(s.shape, dtype=torch.float32, device=dy.device)
        with _triton.on(dy.device):
            arch = _triton.capability(dy.device)
            launch_lora_ds_db(dy, lora_B, s, scaling, ds, dB, arch=arch)
        return ds

    @staticmethod
    def da(
        rows: Tensor, ds: Tensor, lora_A: Tensor, p: float, seed: Tensor | None, dA: Tensor
    ) -> None:
        from fusetune._triton._tile import terms
        from fusetune._triton.lora_da import launch_lora_da

        with _triton.on(rows.device):
            n_terms = terms(lora_A, rows.dtype, _triton.capability(rows.device))
            seeds = None if seed is None else [seed]
            launch_lora_da(rows, [ds], [dA], seeds, **_triton.mask(p, seed), terms=n_terms)


class _ByTorch:
    @staticmethod
    def shrink(rows: Tensor, lora_A: Tensor, p: float, seed: Tensor | None) -> Tensor:
        return dropout(rows.float(), p, seed) @ lora_A.float().T

    @staticmethod
    def ds_db(dy: Tensor, lora_B: Tensor, s: Tensor, scaling: float, dB: Tensor | None) -> Tensor:
        dy32 = dy.float()
        if dB is not None:
            dB.copy_(scaling * (dy32.T @ s))
        return scaling * (dy32 @ lora_B.float())

    @staticmethod
    def da(
        rows: Tensor, ds: Tensor, lora_A: Tensor, p: float, seed: Tensor | None, dA: Tensor
    ) -> None:
        dA.copy_(ds.T @ dropout(rows.float(), p, seed))


def sum_biases(bias: Tensor | None, lora_bias: Tensor | None, scaling: float) -> Tensor | None:
    """bias + scaling * lora_bias, fp32."""
    plain = None if bias is None else bias.detach().resolve_neg().float().contiguous()
    if lora_bias is None:
        return plain
    scaled = lora_bias.detach().resolve_neg().float() * scaling
    return scaled if plain is None else scaled + plain


def _forward(
    narrow: _Narrow,
    rows: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    lora_bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    int16: bool,
) -> tuple[Tensor, Tensor]:
    a, b = _triton.adapter(lora_A), _triton.adapter(lora_B)
    s = narrow.shrink(rows, a, dropout_p, seed)
    both = sum_biases(bias, lora_bias, scaling)
    return _gpu_linear.linear(rows, weight, both, (s, b, scaling)), s


def _backward(
    narrow: _Narrow,
    dy: Tensor,
    rows: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    s: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    a, b = _triton.adapter(lora_A), _triton.adapter(lora_B)
    dx = dA = None
    dB = torch.empty(b.shape, dtype=lora_B.dtype, device=dy.device) if need_dB else None
    ds = narrow.ds_db(dy, b, s, scaling, dB)
    if need_dA:
        dA = torch.empty(a.shape, dtype=lora_A.dtype, device=dy.device)
        narrow.da(rows, ds, a, dropout_p, seed, dA)
    if need_dx:
        mask = None if seed is None else (dropout_p, seed)
        dx = _gpu_linear.linear_dx(dy, weight, (ds, a, 1.0), mask)
    return dx, dA, dB


def _cuda_supports(case: Case) -> str | None:
    """Where Triton is missing, on request: with torch's narrow products more bytes move than in
    PEFT."""
    why = _cuda.supports(case)
    if why is None and backend() != "cuda":
        why = (
            "LoRA's narrow products have no CUDA kernels but Triton's; "
            "FUSETUNE_BACKEND=cuda runs them by torch"
        )
    return why


def _impls(function: Any) -> tuple[Impl, Impl]:
    # Triton before cuda: with it the base matmul still takes the CUDA kernels where they are best.
    return (
        Impl("triton", partial(function, ByTriton), _triton.supports, 20),
        Impl("cuda", partial(function, _ByTorch), _cuda_supports, 15),
    )


GPU_FORWARD = _impls(_forward)
GPU_BACKWARD = _impls(_backward)
