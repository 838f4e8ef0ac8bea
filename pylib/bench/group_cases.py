"""Cases of lora_linear_group, against the same layers one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from fusetune import ops

from .cases import EXACT, NAMES, quantized
from .timing import Case, Result, Run

Tensor = torch.Tensor
Group = Sequence[ops.LoraProjection]
QKV, GATE_UP = (576, 192, 192), (1536, 1536)  # of SmolLM2-135M, x of 576


def separate(x: Tensor, group: Group) -> list[Tensor]:
    return [
        ops.lora_linear(x, p.weight, p.lora_A, p.lora_B, p.scaling, dropout_p=p.dropout_p)
        for p in group
    ]


def lora_linear_group(
    m: int,
    sizes: Sequence[int],
    k: int,
    dtype: torch.dtype,
    *,
    rank: int = 16,
    dropout: float = 0.0,
    dense: bool,
) -> Case:
    """Every y and every gradient of m rows of k, projections of `sizes` rows each."""
    x, dys = torch.randn(m, k).to(dtype), [torch.randn(m, n).to(dtype) for n in sizes]
    weights = [
        torch.randn(n, k).to(dtype) if dense else quantized(n, k, double_quant=True) for n in sizes
    ]
    adapters = [(torch.randn(rank, k) / k**0.5, torch.randn(n, rank)) for n in sizes]

    def all_of(function: Callable[[Tensor, Group], list[Tensor]], exact: bool = False) -> Run:
        def of(tensor: Tensor) -> Tensor:
            return tensor.double() if exact else tensor

        def run() -> Result:
            leaves = [of(t).detach().requires_grad_() for pair in adapters for t in pair]
            start = of(x).detach().requires_grad_()
            group = [
                ops.LoraProjection(
                    of(w) if isinstance(w, Tensor) else w, a, b, 2.0, dropout_p=dropout
                )
                for w, a, b in zip(weights, leaves[::2], leaves[1::2], strict=True)
            ]
            ys = function(start, group)
            up = [of(dy) for dy in dys]
            return *(y.detach() for y in ys), *torch.autograd.grad(ys, [start, *leaves], up)

        return run

    def reference() -> Result:
        with ops.use_backend("reference"):
            return all_of(separate, exact=True)()

    notes = f", dropout {dropout:g}" if dropout else ""
    return Case(
        op="lora_linear_group",
        name=f"{NAMES[dtype]} {'dense' if dense else 'NF4'}, r={rank}{notes}",
        shape=f"{m} × {'/'.join(map(str, sizes))} × {k}",
        ours=all_of(ops.lora_linear_group),
        peers={"separate": all_of(separate)},
        exact=reference,
        tolerance=4 * EXACT[dtype],
    )


def lora_linear_group_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    for sizes in (QKV, GATE_UP):
        for dense in (True, False):
            for m in (256, 512, 2048) if full else (512,):
                yield lora_linear_group(m, sizes, 576, torch.float32, dense=dense)
            if full:
                yield lora_linear_group(512, sizes, 576, torch.float32, dropout=0.05, dense=dense)
