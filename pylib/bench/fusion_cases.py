"""What is measured of AdapterFusion: one fusion, against the composition that AdapterHub runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from fusetune import ops
from fusetune.reference.adapter_fusion import adapter_fusion as definition
from fusetune.reference.dropout import new_seed

from . import composed
from .timing import Case, Result, Run

Tensor = torch.Tensor
Fusion = Callable[[Tensor, Sequence[Tensor], list[Tensor], Tensor], Tensor]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# A score sums H products of sums of H: its rounding errors, and with 16 bits those of the folded
# query, are multiplied by its size in the softmax.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


def adapter_fusion(
    m: int, n: int, h: int, dtype: torch.dtype, *, train: bool, dropout: float = 0.0
) -> Case:
    """n adapters over m rows of h: forward, or forward and backward to all there is."""
    # Scores of the size of 1.
    weights = [torch.randn(h, h) / h**0.5, torch.randn(h), torch.randn(h, h) / h]
    weights.append(torch.randn(h) / h**0.5)
    weights = [t.to(dtype) for t in (*weights, torch.eye(h) + 0.01 * torch.randn(h, h))]
    query, residual, upper = (torch.randn(m, h).to(dtype) for _ in range(3))
    outputs = [torch.randn(m, h).to(dtype) for _ in range(n)]

    def run(fusion: Fusion, dtype: torch.dtype) -> Run:
        def call() -> Result:
            leaves = [t.detach().to(dtype) for t in (query, residual, *weights, *outputs)]
            for leaf in leaves:
                leaf.requires_grad_(train)
            with torch.set_grad_enabled(train):
                out = fusion(leaves[0], leaves[7:], leaves[2:7], leaves[1])
            if not train:
                return out
            # The key's bias has a gradient of zeros without dropout: no relative error.
            wanted = [leaf for leaf in leaves if dropout or leaf is not leaves[5]]
            return torch.autograd.grad(out, wanted, upper.to(dtype))

        return call

    def ours(query: Tensor, outputs: Sequence[Tensor], w: list[Tensor], residual: Tensor) -> Tensor:
        return ops.adapter_fusion(query, outputs, *w, dropout_p=dropout, residual=residual)

    def exact(
        query: Tensor, outputs: Sequence[Tensor], w: list[Tensor], residual: Tensor
    ) -> Tensor:
        w_q, b_q, w_k, b_k, w_v = w
        seed = new_seed(query.device) if dropout else None
        stack = torch.stack(list(outputs))
        given = (query, stack, w_q, b_q, w_k, b_k, w_v, 1.0, dropout, seed, residual)
        return definition(*given)[0]

    notes = f", dropout {dropout:g}" if dropout else ""
    return Case(
        op="adapter_fusion",
        name=f"{'forward + backward' if train else 'forward'} {NAMES[dtype]}, N={n}{notes}",
        shape=f"{m} × {h}",
        ours=run(ours, dtype),
        peers={} if dropout else {"torch": run(projected, dtype)},
        exact=run(exact, torch.float64),
        # What is kept of the scores, and their errors with it, is multiplied by 1 / (1 - dropout).
        tolerance=TOLERANCE[dtype] / (1 - dropout),
    )


def projected(
    query: Tensor, outputs: Sequence[Tensor], w: list[Tensor], residual: Tensor
) -> Tensor:
    out = composed.adapter_fusion(query, outputs, *w, residual=residual)
    assert isinstance(out, Tensor)
    return out


def adapter_fusion_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    """Of the size of a BERT base model, whatever the caller's sizes of a weight."""
    for adapters in (3, 8, 16) if full else (3,):
        for train in (False, True):
            yield adapter_fusion(2048, adapters, 768, torch.float32, train=train)
    if full:
        yield adapter_fusion(2048, 8, 768, torch.bfloat16, train=True)
