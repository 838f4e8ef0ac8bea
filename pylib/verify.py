"""Checks every kernel, on this machine or simulated, against the reference in float64.

Forward and gradients, small ragged shapes, three dtypes, dropout, nested statistics:

    fusetune verify                          what is here: the CPU's kernels and the GPU's
    fusetune verify --backend triton-sim     the Triton kernels' PTX, interpreted: needs no GPU

Without typer: `python -m fusetune.verify triton-sim`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fusetune import _native, ops
from fusetune.bench import (
    attention_cases,
    glu_cases,
    gpu_cases,
    group_cases,
    lora_layer_cases,
    prefix_cases,
    prompt_cases,
)
from fusetune.bench import cases as make
from fusetune.bench.bottleneck_cases import bottleneck
from fusetune.bench.dora_cases import dora_linear
from fusetune.bench.fusion_cases import adapter_fusion
from fusetune.bench.ia3_cases import bias_gradient, ia3_linear
from fusetune.bench.importance_cases import importance
from fusetune.bench.loss_cases import linear_cross_entropy
from fusetune.bench.multi_lora_cases import multi_lora_linear
from fusetune.bench.rms_norm_cases import rms_norm
from fusetune.bench.rotary_cases import rotary
from fusetune.bench.timing import Case, relative_error, seeded
from fusetune.ops import _cuda, _triton

BACKENDS = ("cpu", "triton-sim", "cuda-sim", "triton", "cuda")
M, N, K = 37, 200, 328  # no multiples of a tile, blocks of 64 that straddle rows
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CannotRun(Exception):
    """The kernels of a backend cannot run on this machine; says why."""


@dataclass(frozen=True)
class Check:
    """One op on one backend. `error` is relative, in the Frobenius norm."""

    where: str  # instruction set of the CPU's kernels, or the backend
    case: Case
    error: float

    @property
    def passed(self) -> bool:
        return self.error <= self.case.tolerance

    def line(self) -> str:
        verdict = "ok  " if self.passed else "FAIL"
        case = self.case
        return (
            f"{verdict} {self.where:<11} {case.op:<16} {case.name:<44} {case.shape:<15} "
            f"error {self.error:.1e}, allowed {case.tolerance:.1e}"
        )


def checks(backend: str = "auto") -> Iterator[Check]:
    """Every op and dtype on a backend; "auto": on the CPU's, and on the GPU's where there is one.

    Raises CannotRun where a backend that was asked for cannot, ValueError for an unknown one.
    """
    if backend == "auto":
        for name, reason in (("cpu", _no_cpu), ("triton", _no_triton), ("cuda", _no_cuda)):
            if reason() is None:
                yield from checks(name)
        return
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    yield from _cpu_checks() if backend == "cpu" else _gpu_checks(backend)


def report(backend: str, out: Callable[[str], object] = print) -> int:
    """Prints the checks of a backend. 0: all passed; 1: one failed; 2: it cannot run here."""
    failed = done = 0
    try:
        for check in checks(backend):
            done += 1
            failed += not check.passed
            out(check.line())
    except CannotRun as why:
        out(f"{backend} cannot run here: {why}")
        return 2
    out(f"{done - failed} passed, {failed} failed")
    if not done:
        out("no kernel can run here: every op uses its reference implementation")
    return 1 if failed else 0


# --- the CPU's kernels ----------------------------------------------------------------------------


def _no_cpu() -> str | None:
    return None if _native.C is not None else _native.reason


def _cpu_checks() -> Iterator[Check]:
    if _native.C is None:
        raise CannotRun(_native.reason)
    try:
        for isa in _native.C.available_isas():
            ops.set_isa(isa)
            for case in small_cases():
                yield Check(isa, case, error_of(case, "cpu"))
    finally:
        ops.set_isa("auto")


def error_of(case: Case, backend: str) -> float:
    """NaN, which passes no check, where the kernel is missing or refuses."""
    exact = seeded(case.exact)
    with ops.use_backend(backend):
        return relative_error(seeded(case.ours), exact)


def small_cases() -> Iterator[Case]:
    """Those of the CPU's kernels."""
    for dtype in DTYPES:
        yield make.quantize_4bit(N, K, dtype)
        yield make.dequantize_4bit(N, K, dtype, double_quant=True)
        yield make.cross_entropy(M, N, dtype)
        yield linear_cross_entropy(M, K, N, dtype, ignored=0.3)
        yield from attention_cases.small_cases(dtype)
        yield from glu_cases.small_cases(M, N, dtype)
        yield rms_norm(M, N, dtype)
        yield rotary(2, 3, 1, 5, 40, dtype)
        yield bias_gradient(2 * M, N, dtype)
        yield importance([(5, K), (6, N)], 1, dtype)
        yield importance([(K, 5), (N, 6)], 0, dtype)
        yield bottleneck(M, N, 20, dtype, activation="gelu")
        yield bottleneck(M, N, 20, dtype, dropout=0.3, rows=[M - 20, 0, 20])
        yield adapter_fusion(M, 5, N, dtype, train=True, dropout=0.3)
        yield from prefix_cases.small_cases(dtype)
        yield from prompt_cases.small_cases(dtype)
        yield from lora_layer_cases.small_cases(dtype)
        for m in (1, 6, M):
            yield make.linear_4bit(m, N, K, dtype, double_quant=True)
            yield make.linear_4bit_dx(m, N, K, dtype)
        for kind in (False, True):
            parts: dict[str, Any] = {"dense": kind, "by_row": kind, "dropout": 0.3}
            yield multi_lora_linear(6, 7, N, K, dtype, ranks=[5, 16], **parts)
        for dense in (False, True):
            yield make.lora_linear(M, N, K, dtype, rank=5, dropout=0.3, dense=dense, train=True)
            group: dict[str, Any] = {"rank": 5, "dropout": 0.3, "dense": dense}
            yield group_cases.lora_linear_group(M, (N, 24), K, dtype, **group)
            for p in (0.0, 0.3):
                yield dora_linear(M, N, K, dtype, rank=5, dropout=p, dense=dense)
            for feedforward in (False, True):
                yield ia3_linear(2 * M, N, K, dtype, feedforward=feedforward, dense=dense)
    yield make.linear_4bit(1, N, K, torch.float32, int16=True)


# --- GPU kernels, on a card or simulated ----------------------------------------------------------


def _no_triton() -> str | None:
    return _triton.reason()


def _no_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return _cuda.reason()


def _gpu_checks(backend: str) -> Iterator[Check]:
    with running(backend) as name, ops.use_backend("auto"):
        cases = gpu_cases.triton_cases if name == "triton" else gpu_cases.cuda_cases
        for case in cases():
            yield Check(backend, case, error_of(case, name))


@contextmanager
def running(backend: str) -> Iterator[str]:
    """Makes a GPU backend runnable, and gives its name among the ops' backends.

    Simulated, tensors are the CPU's; on a card new ones are made there. Raises CannotRun.
    """
    name = backend.removesuffix("-sim")
    with ExitStack() as stack:
        if backend.endswith("-sim"):
            _simulate(name, stack)
        else:
            why = _no_triton() if name == "triton" else _no_cuda()
            if why is not None:
                raise CannotRun(why)
            stack.enter_context(torch.device("cuda"))
        yield name


def _simulate(name: str, stack: ExitStack) -> None:
    try:
        from fusetune import sim
        from fusetune.sim.cuda_build import CannotBuild

        simulation = sim.triton_sim if name == "triton" else sim.cuda_sim
        stack.enter_context(simulation())
    except ImportError as error:
        raise CannotRun(f"the simulator needs what is not installed: {error}") from error
    except CannotBuild as error:
        raise CannotRun(str(error)) from error


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fusetune.verify")
    parser.add_argument("backend", nargs="?", default="auto", choices=("auto", *BACKENDS))
    return report(parser.parse_args().backend)


if __name__ == "__main__":
    sys.exit(main())
