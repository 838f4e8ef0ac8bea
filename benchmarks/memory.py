"""Peak memory that an adapter's forward and backward pass add to the process, beside x + y.

    python -m benchmarks.memory [--json benchmarks/results/memory.json]

On the CPU, one thread, fp32. Each case runs in a process of its own, a few times: the first run is
not counted, it pays for what lasts. x, the residual, the parameters and dY are there before; y, dX
and all other gradients, what is kept for the backward pass and scratch memory are what is counted.

x is what has a row for each token and, backward, a gradient: of a fusion the query, and backward
the outputs of its N adapters too, whose gradients are as large as the query's each. y is the
result. The parameters' gradients are results as well, and have a column of their own: a fusion's
three matrices are as large as 2304 rows of 768 features. Exit code 1 where a pass adds more than
1.1 times x + y and these gradients. (Forward alone leaves y and nothing else, half of x + y.)

From 128 KB on, memory is mapped and given back piece by piece (M_MMAP_THRESHOLD), as the C library
does in a fresh process: in the heap, holes of earlier runs would count, a few MiB at random.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import method_tables
from benchmarks.own_process import in_own_process
from fusetune import ops
from fusetune.demo.memory import MIB, PeakMeter
from fusetune.env import cpu_label

LIMIT = 1.1
RUNS = 3
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


class Case(NamedTuple):
    """m rows of h features. width: of the bottleneck, or how many adapters are fused."""

    op: str
    m: int
    h: int
    width: int

    @property
    def backward(self) -> bool:
        return self.op != "adapter_fusion, forward"

    @property
    def x_and_y(self) -> float:
        """In MiB."""
        outputs = self.width if self.op == "adapter_fusion, backward" else 0
        return 4 * self.m * self.h * (2 + outputs) / MIB

    @property
    def parameters(self) -> float:
        """Their gradients, in MiB."""
        if not self.backward:
            return 0
        weights = 2 * self.width if self.op == "bottleneck" else 3 * self.h
        return 4 * weights * self.h / MIB


CASES = (
    Case("bottleneck", 4096, 768, 48),
    Case("bottleneck", 4096, 4096, 64),
    Case("adapter_fusion, forward", 4096, 768, 3),
    Case("adapter_fusion, forward", 4096, 768, 16),
    Case("adapter_fusion, backward", 4096, 768, 3),
    Case("adapter_fusion, backward", 4096, 768, 16),
    Case("adapter_fusion, backward", 16384, 768, 3),
)


def extra(case: Case) -> float | None:
    """MiB that the pass adds at its peak; None where the system does not tell."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 << 10)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return median_peak(_bottleneck(case) if case.op == "bottleneck" else _fusion(case))


def median_peak(run: Callable[[], Any]) -> float | None:
    """MiB that `run` adds at its peak, the first time not counted; None as above."""
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
    train = case.backward
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
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    rows = []
    for case in CASES:
        found = in_own_process(extra, case)
        if found is None:
            print("peak memory cannot be read here: /proc/self/clear_refs", file=sys.stderr)
            return 1
        sizes = {"x_and_y": case.x_and_y, "parameters": case.parameters, "added": found}
        rows.append({**case._asdict(), **sizes})
    figures = {"cpu": cpu_label(), "threads": 1, "rows": rows}
    print(method_tables.memory(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    broken = any(row["added"] > LIMIT * (row["x_and_y"] + row["parameters"]) for row in rows)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
