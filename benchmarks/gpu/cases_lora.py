"""LoRA layers, forward and backward: one, and all of a Llama-8B layer."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

from benchmarks.gpu.measured import (
    DROPOUTS,
    ONE,
    RANKS,
    ROWS,
    SCALING,
    Entry,
    Measured,
    Shape,
    half_dtype,
    leaf,
)
from benchmarks.gpu.schemes import SCHEMES, Projection, ThreeLaunches
from fusetune import ops
from fusetune.bench.cases import EXACT, HAS_PEFT, quantized
from fusetune.bench.timing import Run

# Projections of a Llama-8B layer by the input they share: q, k, v; o; gate, up; down.
LLAMA: list[list[Shape]] = [
    [(4096, 4096), (1024, 4096), (1024, 4096)],
    [(4096, 4096)],
    [(14336, 4096), (14336, 4096)],
    [(4096, 14336)],
]


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


# K a multiple of 64: with another one bitsandbytes' own kernel for the CPU gives wrong results.


def simulated_lora() -> Iterator[Entry]:
    yield "lora M=5 r=8 p=0", lambda: lora([[(40, 128)]], 5, 8, 0.0)


def simulated_layer() -> Iterator[Entry]:
    groups = [[(64, 128), (32, 128)], [(128, 64)]]
    yield "layer M=5 r=8 p=0.1", lambda: lora(groups, 5, 8, 0.1)
