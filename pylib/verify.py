"""Checks every native kernel on this machine against the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fusetune import _native, ops
from fusetune.bench import cases as make
from fusetune.bench.timing import Case, relative_error, seeded

M, N, K = 37, 200, 328  # no multiples of a tile, blocks of 64 that straddle rows
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Check:
    """One op on one instruction set. `error` is relative, in the Frobenius norm."""

    isa: str
    case: Case
    error: float

    @property
    def passed(self) -> bool:
        return self.error <= self.case.tolerance

    def line(self) -> str:
        verdict = "ok  " if self.passed else "FAIL"
        case = self.case
        return (
            f"{verdict} {self.isa:<7} {case.op:<16} {case.name:<42} {case.shape:<15} "
            f"error {self.error:.1e}, allowed {case.tolerance:.1e}"
        )


def checks() -> Iterator[Check]:
    """Every op, dtype and instruction set this machine can run; nothing without native kernels."""
    if _native.C is None:
        return
    try:
        for isa in _native.C.available_isas():
            ops.set_isa(isa)
            for case in small_cases():
                yield Check(isa, case, error_of(case))
    finally:
        ops.set_isa("auto")


def error_of(case: Case) -> float:
    """NaN, which passes no check, where the kernel is missing or refuses."""
    exact = seeded(case.exact)
    with ops.use_backend("cpu"):
        return relative_error(seeded(case.ours), exact)


def small_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        yield make.quantize_4bit(N, K, dtype)
        yield make.dequantize_4bit(N, K, dtype, double_quant=True)
        yield make.cross_entropy(M, N, dtype)
        for m in (1, 6, M):
            yield make.linear_4bit(m, N, K, dtype, double_quant=True)
            yield make.linear_4bit_dx(m, N, K, dtype)
        for dense in (False, True):
            yield make.lora_linear(M, N, K, dtype, rank=5, dropout=0.3, dense=dense, train=True)
    yield make.linear_4bit(1, N, K, torch.float32, int16=True)
