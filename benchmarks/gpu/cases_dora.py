"""DoRA: row norms, and a layer forward and backward."""

from collections.abc import Iterator

import torch

from benchmarks.gpu.measured import (
    DROPOUTS,
    ONE,
    RANKS,
    SCALING,
    Entry,
    Measured,
    Shape,
    half_dtype,
)
from benchmarks.gpu.schemes import Projection, ThreeLaunches, peft_dora_norm
from fusetune import ops
from fusetune.bench.cases import EXACT, no_grad, quantized
from fusetune.bench.dora_cases import dora_linear
from fusetune.bench.timing import Run
from fusetune.reference import dora_norm as dora_reference


def dora(shape: Shape, rank: int) -> Measured:
    """The row norms of W + scaling B A."""
    (n, k), dtype = shape, half_dtype()
    w, a, b = (
        quantized(n, k, double_quant=True),
        torch.randn(rank, k) / k**0.5,
        torch.randn(n, rank),
    )
    q = Projection(ThreeLaunches(w, dtype), a.to(dtype), b.to(dtype), SCALING)
    runs: dict[str, Run] = {
        "ours": lambda: ops.dora_norm(w, a, b, SCALING),
        "PEFT scheme": no_grad(lambda: peft_dora_norm(q)),
    }
    exact = lambda: dora_reference.dora_norm(w, a.double(), b.double(), SCALING)  # noqa: E731
    return Measured(runs, exact, EXACT[torch.float32])


def dora_layer(m: int, shape: Shape, rank: int, p: float) -> Measured:
    """A DoRA layer, forward and backward."""
    case = dora_linear(m, *shape, half_dtype(), rank=rank, dropout=p, dense=False)
    return Measured({"ours": case.ours, **case.peers}, case.exact, case.tolerance, random=p > 0)


def dora_entries() -> Iterator[Entry]:
    for rank in RANKS:
        for n, k in ((4096, 4096), (14336, 4096), (4096, 14336)):
            yield f"dora {n}x{k} r={rank}", lambda n=n, k=k, r=rank: dora((n, k), r)
    for p in DROPOUTS:
        yield f"dora layer M=4096 r=16 p={p:g}", lambda p=p: dora_layer(4096, ONE[0][0], 16, p)


def simulated_dora() -> Iterator[Entry]:
    yield "dora 40x128 r=8", lambda: dora((40, 128), 8)
    yield "dora layer M=5 r=8 p=0", lambda: dora_layer(5, (40, 128), 8, 0.0)
