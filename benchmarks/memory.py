"""Peak memory that an adapter's forward and backward pass add to the process, in units of x + y.

    python -m benchmarks.memory

On the CPU, one thread, fp32. Each case runs in a process of its own, a few times: the first run is
not counted, it pays for what lasts. x, the residual, the parameters and dY are there before; y, dX
and all other gradients, what is kept for the backward pass and scratch memory are what is counted.
y is the fusion's result; backward, the gradients of N adapters' outputs are as large as x each,
and the unit is x + N y. Exit code 1 where one adds more than 1.1 units.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

from fusetune import ops
from fusetune.demo.memory import MIB, PeakMeter

LIMIT = 1.1
RUNS = 3


class Case(NamedTuple):
    """m rows of h features. width: of the bottleneck, or how many adapters are fused."""

    op: str
    m: int
    h: int
    width: int

    @property
    def unit(self) -> float:
        """x + y in MiB; x + N y where a fusion has the gradients of N outputs to give."""
        outputs = 1 if self.op != "adapter_fusion, backward" else self.width
        return 4 * self.m * self.h * (1 + outputs) / MIB


CASES = (
    Case("bottleneck", 4096, 768, 48),
    Case("bottleneck", 4096, 4096, 64),
    Case("adapter_fusion, forward", 4096, 768, 3),
    Case("adapter_fusion, forward", 4096, 768, 16),
    Case("adapter_fusion, backward", 4096, 768, 3),
    Case("adapter_fusion, backward", 4096, 768, 16),
)


def extra(case: Case) -> float | None:
    """MiB that the pass adds at its peak; None where the system does not tell."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run = _bottleneck(case) if case.op == "bottleneck" else _fusion(case)
    run()
    found = []
    for _ in range(RUNS):
        with PeakMeter(torch.device("cpu")) as meter:
            run()
        if meter.peak is None:
            return None
        found.append(meter.peak.extra)
    return statistics.median(found)


def _bottleneck(case: Case) -> Callable[[], Any]:
    _, m, h, d = case
    x = torch.randn(m, h, requires_grad=True)
    shapes = ((d, h), (d,), (h, d), (h,))
    parameters = [(torch.randn(shape) / 8).requires_grad_() for shape in shapes]
    dy = torch.randn(m, h)

    def run() -> Any:
        y = ops.bottleneck(x, *parameters, activation="gelu", residual=x)
        return torch.autograd.grad(y, [x, *parameters], dy)

    return run


def _fusion(case: Case) -> Callable[[], Any]:
    _, m, h, n = case
    train = case.op.endswith("backward")
    query, dy = torch.randn(m, h), torch.randn(m, h)
    values = [torch.randn(m, h, requires_grad=train) for _ in range(n)]
    weights = [torch.randn(h, h) / h, torch.randn(h), torch.randn(h, h) / h, torch.randn(h)]
    weights = [w.requires_grad_(train) for w in (*weights, torch.eye(h))]
    leaves = [query.requires_grad_(train), *values, *weights]

    def run() -> Any:
        out = ops.adapter_fusion(query, values, *weights)
        return torch.autograd.grad(out, leaves, dy, allow_unused=True) if train else out

    return run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.parse_args()
    rows, broken = [], False
    context = get_context("spawn")
    for case in CASES:
        with ProcessPoolExecutor(1, context) as pool:
            found = pool.submit(extra, case).result()
        if found is None:
            print("peak memory cannot be read here: /proc/self/clear_refs", file=sys.stderr)
            return 1
        ratio = found / case.unit
        broken |= ratio > LIMIT
        size = f"{case.m} × {case.h}, {case.width}"
        rows.append((case.op, size, f"{case.unit:.1f}", f"{found:.1f}", f"{ratio:.3f}"))
    print(tabulate(rows, headers=["op", "size", "unit, MiB", "added, MiB", "ratio"]))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
