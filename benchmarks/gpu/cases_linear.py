"""NF4 weights without an adapter, and the ways of the base matmul with a LoRA tail."""

from collections.abc import Iterator

import torch
from torch.nn import functional

from benchmarks.gpu.measured import ROWS, SCALING, Entry, Measured, Shape, half_dtype
from benchmarks.gpu.schemes import ThreeLaunches
from fusetune import ops
from fusetune.bench.cases import EXACT, HAS_BNB, no_grad, quantized
from fusetune.bench.timing import Run
from fusetune.ops import _gpu_choice, _gpu_linear
from fusetune.reference.dequantize_4bit import dequantize_4bit as dense_of


def linear(m: int, shape: Shape) -> Measured:
    """y = x W^T without gradients."""
    (n, k), dtype = shape, half_dtype()
    w, x = quantized(n, k, double_quant=True), torch.randn(m, k).to(dtype)
    decoder, dense = ThreeLaunches(w, dtype), ops.dequantize_4bit(w, dtype)
    runs: dict[str, Run] = {"ours": lambda: ops.linear_4bit(x, w)}
    if HAS_BNB:
        import bitsandbytes

        param = w.to_bnb()
        runs["bitsandbytes"] = lambda: bitsandbytes.matmul_4bit(
            x, param.data.t(), quant_state=param.quant_state
        )
    runs["three launches + matmul"] = lambda: x @ decoder.dense().T
    runs["dense weight"] = lambda: functional.linear(x, dense)
    runs = {name: no_grad(run) for name, run in runs.items()}
    return Measured(runs, lambda: x.double() @ dense_of(w, torch.float64).T, 2 * EXACT[dtype])


def dequantize(shape: Shape) -> Measured:
    dtype = half_dtype()
    w = quantized(*shape, double_quant=True)
    out, decoder = torch.empty(shape, dtype=dtype), ThreeLaunches(w, dtype)
    runs: dict[str, Run] = {"ours": lambda: ops.dequantize_4bit(w, out=out)}
    if HAS_BNB:
        from bitsandbytes.functional import dequantize_4bit

        state, packed = w.to_bnb().quant_state, w.packed.view(-1, 1)
        state.dtype = dtype
        runs["bitsandbytes"] = lambda: dequantize_4bit(packed, state)
    runs["three launches"] = decoder.dense
    facts = {"bytes": w.nbytes + out.nbytes}
    return Measured(runs, lambda: dense_of(w, torch.float64), EXACT[dtype], facts=facts)


def ways(m: int, shape: Shape, rank: int, *, dx: bool, p: float = 0.0) -> Measured:
    """Each way of the base matmul with a LoRA tail, beside the one that is taken by default."""
    (n, k), dtype = shape, half_dtype()
    w = quantized(n, k, double_quant=True)
    s, seed = torch.randn(m, rank), torch.tensor([1234567])
    rows = torch.randn(m, n if dx else k).to(dtype)
    right = torch.randn(rank, k) / k**0.5 if dx else torch.randn(n, rank)
    mask = (p, seed) if p else None

    def run() -> torch.Tensor:
        if dx:
            return _gpu_linear.linear_dx(rows, w, (s, right, 1.0), mask)
        return _gpu_linear.linear(rows, w, None, (s, right, SCALING))

    def forced(way: str) -> Run:
        def call() -> torch.Tensor:
            with _gpu_choice.use_way(way):
                return run()

        return call

    return Measured(
        {"ours": run, **{w: forced(w) for w in ("cuda", "triton", "addmm", "augmented")}}
    )


def linear_entries() -> Iterator[Entry]:
    for n, k in ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096)):
        for m in (1, 8, 16, 64, 256, 1024, 4096):
            yield f"linear {n}x{k} M={m}", lambda m=m, n=n, k=k: linear(m, (n, k))


def dequantize_entries() -> Iterator[Entry]:
    for n, k in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)):
        yield f"dequantize {n}x{k}", lambda n=n, k=k: dequantize((n, k))


def ways_entries() -> Iterator[Entry]:
    for m in ROWS:
        for n, k in ((4096, 4096), (14336, 4096)):
            yield f"ways y {n}x{k} M={m}", lambda m=m, s=(n, k): ways(m, s, 16, dx=False)
            yield f"ways dx {n}x{k} M={m}", lambda m=m, s=(n, k): ways(m, s, 16, dx=True)
    yield "ways dx 4096x4096 M=4096 p=0.1", lambda: ways(4096, (4096, 4096), 16, dx=True, p=0.1)


# K a multiple of 64: with another one bitsandbytes' own kernel for the CPU gives wrong results.


def simulated_linear() -> Iterator[Entry]:
    yield "linear 40x128 M=3", lambda: linear(3, (40, 128))


def simulated_dequantize() -> Iterator[Entry]:
    yield "dequantize 40x128", lambda: dequantize((40, 128))


def simulated_ways() -> Iterator[Entry]:
    yield "ways y 40x128 M=5", lambda: ways(5, (40, 128), 8, dx=False)
