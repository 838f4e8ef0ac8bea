"""Four LoRA adapters at once, one for each eighth of the rows and one eighth without any."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benchmarks.gpu_case import MATMUL, PIPELINED, Case
from benchmarks.gpu_launches import DROPOUT, RANK, Sizes, fp32, half, half_of
from fusetune.reference.dropout import threshold_and_scale

if TYPE_CHECKING:
    from fusetune._triton._adapters import Plan

Tensor = torch.Tensor

ADAPTERS = 4
OWNERS = (0, 1, 2, 3, 3, 1, -1, 0)
SERVED = 7 / 8  # of the rows


def _plan(p: float = 0.0) -> Plan:
    from fusetune._triton._adapters import make_plan

    many = (threshold_and_scale(p),) * ADAPTERS
    return make_plan(OWNERS, (RANK,) * ADAPTERS, (2.0,) * ADAPTERS, many, torch.device("cpu"))


def _seeds(p: float) -> Tensor | None:
    return torch.arange(ADAPTERS) if p else None


def _low(m: int, plan: Plan) -> Tensor:
    return fp32(m // len(OWNERS) * plan.size)


def shrink(sizes: Sizes, arch: int, p: float = 0.0) -> None:
    from fusetune._triton.multi_lora_linear import launch_multi_shrink

    m, _, k = sizes
    a = half(arch, ADAPTERS * RANK * k)
    launch_multi_shrink(half(arch, m, k), a, _plan(p), _seeds(p), arch=arch)


def shrink_bytes(sizes: Sizes) -> int:
    m, _, k = sizes
    rows = int(SERVED * m)
    return 2 * rows * k + 2 * ADAPTERS * RANK * k + 4 * rows * RANK


def ds_db(sizes: Sizes, arch: int) -> None:
    from fusetune._triton.multi_lora_linear import launch_multi_ds_db

    m, n, _ = sizes
    plan = _plan()
    b, db = (half(arch, ADAPTERS * n * RANK) for _ in range(2))
    launch_multi_ds_db(half(arch, m, n), b, _low(m, plan), plan, db, arch=arch)


def da(sizes: Sizes, arch: int, p: float = 0.0) -> None:
    from fusetune._triton._tile import terms
    from fusetune._triton.multi_lora_linear import launch_multi_da

    m, _, k = sizes
    plan, out = _plan(p), half(arch, ADAPTERS * RANK * k)
    n_terms = terms(out, half_of(arch), arch)
    launch_multi_da(half(arch, m, k), _low(m, plan), plan, _seeds(p), out, terms=n_terms)


def linear(sizes: Sizes, arch: int, base: bool = True) -> None:
    """Without the base product: what is added where another kernel multiplied."""
    from fusetune._triton.linear import Tails, launch_linear

    m, n, k = sizes
    plan = _plan()
    tails = Tails(_low(m, plan), half(arch, ADAPTERS * n * RANK), plan)
    x, w = (half(arch, m, k), half(arch, n, k)) if base else (None, None)
    launch_linear(x, w, half(arch, m, n), arch=arch, tails=tails)


def linear_dx(sizes: Sizes, arch: int) -> None:
    from fusetune._triton.linear import Tails, launch_linear

    m, n, k = sizes
    plan = _plan(DROPOUT)
    a = half(arch, ADAPTERS * RANK * k)
    tails = Tails(_low(m, plan), a, plan, dx=True, seeds=_seeds(DROPOUT))
    launch_linear(half(arch, m, n), half(arch, n, k).T, half(arch, m, k), arch=arch, tails=tails)


SEVERAL = (
    Case(
        "lora_shrink by row, dropout",
        "triton",
        "_shrink",
        lambda s, arch: shrink(s, arch, DROPOUT),
        PIPELINED,
        compulsory=shrink_bytes,
    ),
    Case("lora_ds_db by row", "triton", "_ds_db", ds_db, MATMUL),
    Case(
        "lora_da by row, dropout",
        "triton",
        "_da",
        lambda s, arch: da(s, arch, DROPOUT),
        PIPELINED,
    ),
    Case(
        "linear with tails by row",
        "triton",
        "_linear",
        linear,
        PIPELINED,
        newest=True,
        turing=False,
    ),
    Case(
        "linear_dx with tails by row, dropout",
        "triton",
        "_linear",
        linear_dx,
        PIPELINED,
        newest=True,
        turing=False,
    ),
    Case(
        "tails by row, few rows",
        "triton",
        "_linear",
        lambda s, arch: linear(s, arch, base=False),
        small=Sizes(32, 256, 512),
        full=Sizes(64, 4096, 4096),
    ),
)
