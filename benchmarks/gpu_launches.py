"""How each GPU kernel is called at given sizes, as the ops do it: the cases of gpu_kernels.py."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from fusetune.ops import _cuda, _triton
from fusetune.quantized_weight import QuantizedWeight
from fusetune.reference.dropout import threshold_and_scale

Tensor = torch.Tensor

RANK = 16
DROPOUT = 0.1


class Sizes(NamedTuple):
    """M rows of x [M, K] times W [N, K]."""

    m: int
    n: int
    k: int


def half_of(arch: int) -> torch.dtype:
    """Two bytes an element: fp16 on sm_75, which has no bf16."""
    return torch.bfloat16 if arch >= 80 else torch.float16


def half(arch: int, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros: no count depends on dense operands. Large ones cost nothing until they are touched."""
    return torch.zeros(shape, dtype=dtype or half_of(arch))


def fp32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32)


@cache
def weight(n: int, k: int) -> QuantizedWeight:
    """Random codes: how often look-ups meet in a bank depends on them."""
    random = torch.Generator().manual_seed(n + k)
    byte = {"dtype": torch.uint8, "generator": random}
    blocks = n * k // 64
    return QuantizedWeight(
        packed=torch.randint(256, (n * k // 2,), **byte),  # type: ignore[call-overload]
        absmax=torch.randint(256, (blocks,), **byte),  # type: ignore[call-overload]
        quant_type="nf4",
        blocksize=64,
        shape=torch.Size((n, k)),
        dtype=torch.bfloat16,
        nested_absmax=torch.full((-(-blocks // 256),), 0.01),
        nested_code=torch.linspace(-1, 1, 256),
        nested_offset=torch.tensor(0.03),
    )


def plain_weight(n: int, k: int) -> QuantizedWeight:
    """The same with an absmax in fp32."""
    nested = weight(n, k)
    absmax = torch.full((n * k // 64,), 0.03)
    return QuantizedWeight(nested.packed, absmax, "nf4", 64, nested.shape, nested.dtype)


# --- Triton ---------------------------------------------------------------------------------------


def dequantize(sizes: Sizes, arch: int, nested: bool = True) -> None:
    _, n, k = sizes
    _triton.dequantize_4bit(weight(n, k) if nested else plain_weight(n, k), half(arch, n, k))


def rows(sizes: Sizes, arch: int, merge: bool) -> None:
    from fusetune._triton.dequantize_4bit import launch_rows

    _, n, k = sizes
    a, b = half(arch, RANK, k) if merge else None, half(arch, n, RANK)
    out = half(arch, n, k if merge else k + RANK)
    launch_rows(
        _triton.packed(weight(n, k)), n, k, lora_A=a, lora_B=b, scaling=2.0, out=out, arch=arch
    )


def dora_norm(sizes: Sizes, arch: int) -> None:
    from fusetune._triton.dora_norm import launch_dora_norm

    _, n, k = sizes
    norm = fp32(n)
    launch_dora_norm(
        _triton.packed(weight(n, k)), half(arch, RANK, k), half(arch, n, RANK), 2.0, norm, arch=arch
    )


def mask(p: float) -> tuple[Tensor | None, int, float]:
    """(seed, threshold, factor) as the launchers take them."""
    if not p:
        return None, 0, 1.0
    return torch.tensor([1]), *threshold_and_scale(p)


def dropout(sizes: Sizes, arch: int) -> None:
    from fusetune._triton.dropout import launch_dropout

    m, _, k = sizes
    x, kept, rest = (half(arch, m, k) for _ in range(3))
    launch_dropout(x, kept, torch.tensor([1]), *threshold_and_scale(DROPOUT), rest)


def shrink(
    sizes: Sizes, arch: int, count: int = 1, p: float = 0.0, adapter: torch.dtype | None = None
) -> None:
    from fusetune._triton.lora_shrink import launch_lora_shrink

    m, _, k = sizes
    seed, threshold, factor = mask(p)
    loras = [half(arch, RANK, k, dtype=adapter) for _ in range(count)]
    seeds = None if seed is None else [seed] * count
    launch_lora_shrink(half(arch, m, k), loras, seeds, threshold, factor, arch=arch)


def ds_db(sizes: Sizes, arch: int, adapter: torch.dtype | None = None) -> None:
    from fusetune._triton.lora_ds_db import launch_lora_ds_db

    m, n, _ = sizes
    s, ds = (fp32(m, RANK) for _ in range(2))
    b, db = (half(arch, n, RANK, dtype=adapter) for _ in range(2))
    launch_lora_ds_db(half(arch, m, n), b, s, 2.0, ds, db, arch=arch)


def da(
    sizes: Sizes, arch: int, p: float = 0.0, adapter: torch.dtype | None = None, count: int = 1
) -> None:
    from fusetune._triton._tile import terms
    from fusetune._triton.lora_da import launch_lora_da

    m, _, k = sizes
    outs = [half(arch, RANK, k, dtype=adapter) for _ in range(count)]
    ds, (seed, threshold, factor) = [fp32(m, RANK) for _ in range(count)], mask(p)
    seeds = None if seed is None else [seed] * count
    n_terms = terms(outs[0], half_of(arch), arch)
    launch_lora_da(half(arch, m, k), ds, outs, seeds, threshold, factor, terms=n_terms)


def sum_parts(sizes: Sizes, arch: int) -> None:
    from fusetune._triton._tile import sum_parts

    m, _, _ = sizes
    sum_parts(fp32(8, m, RANK), half(arch, m, RANK), 2.0)


def linear(sizes: Sizes, arch: int, dtype: torch.dtype | None = None) -> None:
    from fusetune._triton.linear import Tail, launch_linear

    m, n, k = sizes
    tail = Tail(fp32(m, RANK), half(arch, n, RANK, dtype=dtype), 2.0)
    x, w, y = (half(arch, *shape, dtype=dtype) for shape in ((m, k), (n, k), (m, n)))
    launch_linear(x, w, y, arch=arch, tail=tail)


def linear_dx(sizes: Sizes, arch: int, p: float = 0.0, add: bool = False) -> None:
    from fusetune._triton.linear import Dropout, Tail, launch_linear

    m, n, k = sizes
    tail = Tail(fp32(m, RANK), half(arch, RANK, k).T, 1.0)
    seed, threshold, factor = mask(p)
    dropout = None if seed is None else Dropout(seed, threshold, factor)
    dy, w, dx = half(arch, m, n), half(arch, n, k), half(arch, m, k)
    launch_linear(dy, w.T, dx, arch=arch, tail=tail, dropout=dropout, add=add)


def dropped_tail(sizes: Sizes, arch: int) -> None:
    """What is added to dX where another kernel multiplied."""
    from fusetune._triton.linear import Dropout, Tail, launch_linear

    m, _, k = sizes
    tail = Tail(fp32(m, RANK), half(arch, RANK, k).T, 1.0)
    dropout = Dropout(torch.tensor([1]), *threshold_and_scale(DROPOUT))
    launch_linear(None, None, half(arch, m, k), arch=arch, tail=tail, dropout=dropout)


def attend(sizes: Sizes, arch: int, backward: bool = False) -> None:
    """n: how many adapters."""
    from fusetune._triton.adapter_fusion import launch_fusion_attend
    from fusetune._triton.adapter_fusion_backward import launch_fusion_attend_backward

    m, n, h = sizes
    g, values = half(arch, m, h), [half(arch, n, m, h)]
    if not backward:
        launch_fusion_attend(g, values, None, 1.0)
        return
    p = fp32(m, n)
    launch_fusion_attend_backward(g, g, values, p, 1.0, need_dvalues=True)


def glu(sizes: Sizes, arch: int, backward: bool = False) -> None:
    from fusetune._triton.glu import launch_glu, launch_glu_backward

    m, n, _ = sizes
    gate, up, y = (half(arch, m, n) for _ in range(3))
    if not backward:
        launch_glu(gate, up, "gelu_new", y)
        return
    launch_glu_backward(y, gate, up, "gelu_new", half(arch, m, n), half(arch, m, n))


# --- CUDA -----------------------------------------------------------------------------------------


def _tail(m: int, right: Tensor) -> tuple[Tensor, Tensor, float]:
    return fp32(m, RANK), right, 2.0


def cuda_linear(sizes: Sizes, arch: int, splits: int = 0) -> None:
    m, n, k = sizes
    x, b = half(arch, m, k), fp32(n, RANK)
    _cuda.linear_4bit(x, weight(n, k), None, _tail(m, b), splits)


def cuda_linear_fp32(sizes: Sizes, arch: int) -> None:
    m, n, k = sizes
    b = fp32(n, RANK)
    _cuda.linear_4bit(fp32(m, k), weight(n, k), None, _tail(m, b))


def cuda_dx(sizes: Sizes, arch: int, p: float = 0.0) -> None:
    m, n, k = sizes
    dropout = (p, torch.tensor([1])) if p else None
    tail = _tail(m, fp32(RANK, k))
    _cuda.linear_4bit_dx(half(arch, m, n), weight(n, k), tail, dropout, splits=1)


def cuda_dequantize(sizes: Sizes, arch: int) -> None:
    _, n, k = sizes
    _cuda.dequantize_4bit(weight(n, k), half(arch, n, k))
