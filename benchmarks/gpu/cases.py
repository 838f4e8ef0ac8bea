"""What is measured on a card, case by case; ours comes first among the contenders.

    python -m benchmarks.gpu.cases GROUP... --json FILE [--seconds S] [--simulate]

runs the cases of groups that FILE does not hold yet and writes each as it is done. Ours is first
compared with float64: where it is wrong nothing is timed. Simulated, shapes are tiny, every
contender runs once, and nothing is timed at all.
"""

import argparse
import importlib.util
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.gpu import timing
from benchmarks.gpu.schemes import SCHEMES, Projection, ThreeLaunches, peft_dora_norm
from benchmarks.gpu.store import load, save, source_hash, store
from fusetune import ops
from fusetune.bench.cases import EXACT, no_grad, quantized
from fusetune.bench.dora_cases import dora_linear
from fusetune.bench.timing import Run, relative_error, seeded
from fusetune.ops import _gpu_choice, _gpu_linear
from fusetune.reference import dora_norm as dora_reference
from fusetune.reference.dequantize_4bit import dequantize_4bit as dense_of

HAS_BNB = importlib.util.find_spec("bitsandbytes") is not None
HAS_PEFT = HAS_BNB and importlib.util.find_spec("peft") is not None
RANKS, DROPOUTS, ROWS = (16, 8, 64), (0.0, 0.1), (4096, 16, 1, 64, 256, 1024)
SCALING = 2.0
Shape = tuple[int, int]  # N, K
ONE: list[list[Shape]] = [[(4096, 4096)]]
# Projections of a Llama-8B layer by the input they share: q, k, v; o; gate, up; down.
LLAMA: list[list[Shape]] = [
    [(4096, 4096), (1024, 4096), (1024, 4096)],
    [(4096, 4096)],
    [(14336, 4096), (14336, 4096)],
    [(4096, 14336)],
]
ATTEMPTS = 2  # a case that was begun so often, and never ended, is given up


@dataclass
class Measured:
    """A case. `runs`: ours first.

    exact: float64, or None where that would not fit. random: each contender has its own dropout.
    """

    runs: dict[str, Run]
    exact: Run | None = None
    tolerance: float = 0.0
    random: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


Entry = tuple[str, Callable[[], Measured]]  # key, and what makes it


def half_dtype() -> torch.dtype:
    """bfloat16, or float16 where the card has no matmuls in it."""
    old = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
    return torch.float16 if old else torch.bfloat16


# --- LoRA layers, forward and backward ------------------------------------------------------------


def lora(groups: list[list[Shape]], m: int, rank: int, p: float) -> Measured:
    """Outputs, and the gradients of inputs and adapters, of all projections."""
    dtype = half_dtype()
    weights = [[quantized(n, k, double_quant=True) for n, k in group] for group in groups]
    xs = [torch.randn(m, group[0][1]).to(dtype) for group in groups]
    dys = [torch.randn(m, n).to(dtype) for group in groups for n, _ in group]
    adapters = [
        [(torch.randn(rank, k) / k**0.5, torch.randn(n, rank) / rank**0.5) for n, k in group]
        for group in groups
    ]

    def step(forward: Callable[..., list[torch.Tensor]], adapter: torch.dtype | None = None) -> Run:
        """forward(group's index, x, [(A, B), ...]) -> outputs."""
        owned = [
            [[torch.nn.Parameter(t.to(adapter or t.dtype, copy=True)) for t in ab] for ab in group]
            for group in adapters
        ]
        parameters = [t for group in owned for pair in group for t in pair]

        def run() -> tuple[torch.Tensor, ...]:
            acc = torch.float64 if adapter == torch.float64 else dtype
            inputs = [x.to(acc).requires_grad_() if acc != dtype else leaf(x) for x in xs]
            ys = [
                y
                for i, (x, pairs) in enumerate(zip(inputs, owned, strict=True))
                for y in forward(i, x, pairs)
            ]
            grads = torch.autograd.grad(ys, [*inputs, *parameters], [dy.to(acc) for dy in dys])
            return (*(y.detach() for y in ys), *grads)

        return run

    def ours(i: int, x: torch.Tensor, pairs: list[Any]) -> list[torch.Tensor]:
        return [
            ops.lora_linear(x, w, a, b, SCALING, dropout_p=p)
            for w, (a, b) in zip(weights[i], pairs, strict=True)
        ]

    decoders = [[ThreeLaunches(w, dtype) for w in group] for group in weights]

    def scheme(function: Any) -> Callable[..., list[torch.Tensor]]:
        def forward(i: int, x: torch.Tensor, pairs: list[Any]) -> list[torch.Tensor]:
            projections = [
                Projection(d, a, b, SCALING) for d, (a, b) in zip(decoders[i], pairs, strict=True)
            ]
            return function(x, projections, p)

        return forward

    def exact() -> Any:
        with ops.use_backend("reference"):
            return step(ours, torch.float64)()

    runs = {"ours": step(ours)}
    runs |= {name: step(scheme(function), dtype) for name, function in SCHEMES.items()}
    if HAS_PEFT:
        runs["PEFT + bitsandbytes"] = step(peft_layers(weights, rank, p, dtype), dtype)
    small = m * sum(n * k for group in groups for n, k in group) <= 2**37
    # Four roundings in a row, and the sum of the inputs' gradients over a group.
    return Measured(runs, exact if small else None, 6 * EXACT[dtype], random=p > 0)


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().requires_grad_()


def peft_layers(weights: Any, rank: int, p: float, dtype: torch.dtype) -> Any:
    """PEFT's own layers on bitsandbytes' weights; they take over the adapters at the first call."""
    from fusetune.bench.cases import peft_layer

    def layer(w: Any) -> Any:
        n, k = w.shape
        a, b = torch.zeros(rank, k), torch.zeros(n, rank)
        return peft_layer(w, n, k, dtype, a, b, SCALING, p, True)[0]

    @cache
    def layers(i: int) -> list[Any]:
        return [layer(w) for w in weights[i]]

    def forward(i: int, x: torch.Tensor, pairs: list[Any]) -> list[torch.Tensor]:
        ys = []
        for layer, (a, b) in zip(layers(i), pairs, strict=True):
            if layer.lora_A["default"].weight is not a:
                layer.lora_A["default"].weight, layer.lora_B["default"].weight = a, b
            ys.append(layer(x))
        return ys

    return forward


# --- other ops ------------------------------------------------------------------------------------


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


# --- the lists ------------------------------------------------------------------------------------


def entries(group: str, simulated: bool) -> Iterator[Entry]:
    """Most telling first: the time may not suffice for all."""
    yield from (SIMULATED if simulated else GROUPS)[group]()


def lora_entries() -> Iterator[Entry]:
    for rank in RANKS:
        for p in DROPOUTS:
            for m in ROWS:
                yield f"lora M={m} r={rank} p={p:g}", lambda m=m, r=rank, p=p: lora(ONE, m, r, p)


def layer_entries() -> Iterator[Entry]:
    for rank in RANKS:
        for p in DROPOUTS:
            for m in ROWS:
                key = f"layer M={m} r={rank} p={p:g}"
                yield key, lambda m=m, r=rank, p=p: lora(LLAMA, m, r, p)


def linear_entries() -> Iterator[Entry]:
    for n, k in ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096)):
        for m in (1, 8, 16, 64, 256, 1024, 4096):
            yield f"linear {n}x{k} M={m}", lambda m=m, n=n, k=k: linear(m, (n, k))


def dequantize_entries() -> Iterator[Entry]:
    for n, k in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)):
        yield f"dequantize {n}x{k}", lambda n=n, k=k: dequantize((n, k))


def dora_entries() -> Iterator[Entry]:
    for rank in RANKS:
        for n, k in ((4096, 4096), (14336, 4096), (4096, 14336)):
            yield f"dora {n}x{k} r={rank}", lambda n=n, k=k, r=rank: dora((n, k), r)
    for p in DROPOUTS:
        yield f"dora layer M=4096 r=16 p={p:g}", lambda p=p: dora_layer(4096, ONE[0][0], 16, p)


def ways_entries() -> Iterator[Entry]:
    for m in ROWS:
        for n, k in ((4096, 4096), (14336, 4096)):
            yield f"ways y {n}x{k} M={m}", lambda m=m, s=(n, k): ways(m, s, 16, dx=False)
            yield f"ways dx {n}x{k} M={m}", lambda m=m, s=(n, k): ways(m, s, 16, dx=True)
    yield "ways dx 4096x4096 M=4096 p=0.1", lambda: ways(4096, (4096, 4096), 16, dx=True, p=0.1)


GROUPS: dict[str, Callable[[], Iterator[Entry]]] = {
    "dequantize": dequantize_entries,
    "linear": linear_entries,
    "lora": lora_entries,
    "dora": dora_entries,
    "ways": ways_entries,
    "layer": layer_entries,
}
# The same builders at sizes that an interpreter can do. K a multiple of 64: with another one
# bitsandbytes' own kernel for the CPU gives wrong results.
_LAYER = [[(64, 128), (32, 128)], [(128, 64)]]
SIMULATED: dict[str, Callable[[], Iterator[Entry]]] = {
    "dequantize": lambda: iter([("dequantize 40x128", lambda: dequantize((40, 128)))]),
    "linear": lambda: iter([("linear 40x128 M=3", lambda: linear(3, (40, 128)))]),
    "lora": lambda: iter([("lora M=5 r=8 p=0", lambda: lora([[(40, 128)]], 5, 8, 0.0))]),
    "dora": lambda: iter(
        [
            ("dora 40x128 r=8", lambda: dora((40, 128), 8)),
            ("dora layer M=5 r=8 p=0", lambda: dora_layer(5, (40, 128), 8, 0.0)),
        ]
    ),
    "ways": lambda: iter([("ways y 40x128 M=5", lambda: ways(5, (40, 128), 8, dx=False))]),
    "layer": lambda: iter([("layer M=5 r=8 p=0.1", lambda: lora(_LAYER, 5, 8, 0.1))]),
}


# --- running them ---------------------------------------------------------------------------------


def run_case(make: Callable[[], Measured], seconds: float, simulated: bool) -> dict[str, Any]:
    """What was measured. Raises where ours fails or is wrong; another that fails is left out."""
    with torch.device("cpu" if simulated else timing.DEVICE):
        case = make()
        runs, measured = checked(case)
    result: dict[str, Any] = dict(case.facts)
    if "error" in measured["ours"]:
        result |= {"error": measured["ours"]["error"], "allowed": case.tolerance}
    if not simulated:
        for name, times in timing.compare(runs, seconds).items():
            measured[name] |= times
    return {**result, "contenders": measured}


def checked(case: Measured) -> tuple[dict[str, Run], dict[str, Any]]:
    """The contenders that run, and the error of all or why they do not run."""
    exact = None if case.exact is None else seeded(case.exact)
    runs: dict[str, Run] = {}
    measured: dict[str, Any] = {}
    for name, run in case.runs.items():
        try:
            got = seeded(run)
        except Exception as error:
            if name == "ours":
                raise
            measured[name] = {"failure": first_line(error)}
            continue
        runs[name], measured[name] = run, {}
        if exact is None or (case.random and name != "ours"):
            continue
        error_of = measured[name]["error"] = relative_error(got, exact)
        if name == "ours" and not error_of <= case.tolerance:
            raise RuntimeError(f"error {error_of:.2e}, allowed {case.tolerance:.2e}")
    return runs, measured


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def run_group(group: str, path: Path, seconds: float, simulated: bool) -> int:
    """0: all done; 1: some failed; 3: the device is lost, and a new process has to go on."""
    failed = False
    for key, make in entries(group, simulated):
        known = load(path)["cases"].get(key, {})
        begun = known.get("begun", 0)
        if known.get("source") == source_hash():
            if "contenders" in known:
                continue
            if begun >= ATTEMPTS:
                failed = True
                continue
        else:
            begun = 0
        entry: dict[str, Any] = {"group": group, "source": source_hash(), "begun": begun + 1}
        store(path, key, {**entry, "failure": "began, and did not end"})
        start = time.perf_counter()
        try:
            entry |= run_case(make, seconds, simulated)
            outcome = ""
        except Exception as error:
            entry["failure"] = outcome = first_line(error)
            traceback.print_exc()
            failed = True
        store(path, key, entry)
        took = time.perf_counter() - start
        print(f"{key:<36} {took:5.1f} s  {outcome or summary(entry)}", flush=True)
        if outcome and not simulated and not alive():
            return 3
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 1 if failed else 0


def summary(entry: dict[str, Any]) -> str:
    measured = entry["contenders"].items()
    times = [f"{name} {value['ms']:.3f} ms" for name, value in measured if "ms" in value]
    error = f"error {entry['error']:.1e}" if "error" in entry else "not compared with float64"
    return ", ".join([*times, error])


def alive() -> bool:
    """Whether the device still takes work: after some errors it never does in this process."""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=timing.DEVICE).item()
    except Exception:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.cases")
    parser.add_argument("groups", nargs="+", choices=[*GROUPS, "card"], metavar="GROUP")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each case")
    parser.add_argument("--simulate", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    with ExitStack() as stack:
        if options.simulate:
            simulate(stack)
        code = 0
        for group in options.groups:
            if group == "card":
                measure_card(options.json, options.simulate)
            else:
                code = max(code, run_group(group, options.json, options.seconds, options.simulate))
            if code == 3:
                break
    return code


def simulate(stack: ExitStack) -> None:
    """Triton's kernels and, where there is an nvcc, CUDA's: both, as on a card."""
    from fusetune import sim
    from fusetune.sim.cuda_build import CannotBuild

    try:
        stack.enter_context(sim.cuda_sim())
    except CannotBuild as error:
        print(f"without the CUDA kernels: {error}")
    stack.enter_context(sim.triton_sim())
    stack.enter_context(ops.use_backend("auto"))


def measure_card(path: Path, simulated: bool) -> None:
    content = load(path)
    content.setdefault("card", {}).update(timing.card(simulated))
    save(path, content)
    print(json.dumps(content["card"], indent=1))


if __name__ == "__main__":
    sys.exit(main())
