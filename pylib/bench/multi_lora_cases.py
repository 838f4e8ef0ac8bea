"""What checks a layer under several LoRA adapters. Its times: benchmarks/multi_adapter.py."""

from __future__ import annotations

from typing import Any

import torch

from fusetune import ops
from fusetune.reference.dequantize_4bit import dequantize_4bit as dense_of

from .timing import Case, Result

Tensor = torch.Tensor
# As of LoRA's: up to four roundings in a row.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


def multi_lora_linear(
    rows: int,
    tokens: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    ranks: list[int],
    dropout: float,
    dense: bool,
    by_row: bool,
) -> Case:
    """Forward, and backward to x and every lora_A and lora_B, of rows x tokens vectors."""
    w = ops.quantize_4bit(torch.randn(n, k) / k**0.5, double_quant=True)
    weight: Any = dense_of(w, dtype) if dense else w
    parameters = [torch.randn(r, k) / k**0.5 for r in ranks] + [torch.randn(n, r) for r in ranks]
    parameters = [p.requires_grad_() for p in parameters]
    x, dy = torch.randn(rows, tokens, k).to(dtype), torch.randn(rows, tokens, n).to(dtype)
    count = len(ranks)
    # The last row has no adapter.
    adapter_of = [row % count for row in range(rows - 1)] + [-1] if by_row else None

    def step(x: Tensor, trained: list[Tensor]) -> Result:
        x = x.detach().requires_grad_()
        y = ops.multi_lora_linear(
            x,
            weight,
            trained[:count],
            trained[count:],
            [2.0] * count,
            adapter_of=adapter_of,
            dropout_p=dropout,
        )
        return torch.autograd.grad(y, [x, *trained], dy.to(x.dtype))

    def exact() -> Result:
        doubles = [p.detach().double().requires_grad_() for p in parameters]
        with ops.use_backend("reference"):
            return step(x.double(), doubles)

    name = f"{str(dtype)[6:]} {'dense' if dense else 'NF4'}, {'by row' if by_row else 'summed'}"
    return Case(
        op="multi_lora_linear",
        name=f"{name}, r={ranks}{f', dropout {dropout:g}' if dropout else ''}",
        shape=f"{rows * tokens} × {n} × {k}",
        ours=lambda: step(x, parameters),
        peers={},
        exact=exact,
        tolerance=TOLERANCE[dtype],
        flops=4.0 * rows * tokens * n * k,
    )
