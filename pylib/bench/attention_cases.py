"""What is measured of attention with dropout, and of dropout alone: against PyTorch's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from fusetune import ops
from fusetune.reference.dropout import dropout as dropped
from fusetune.reference.dropout import new_seed

from .timing import Case, Result, Run

Tensor = torch.Tensor
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# A score sums D products; its rounding errors, and those of a 16-bit result, come to gradients.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


def attention(
    batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype, *, p: float, causal: bool
) -> Case:
    """Forward and backward to all three; PyTorch's has another mask at the same rate."""
    shape = (batch, tokens, heads, dim)  # as a model has them: heads behind tokens
    *given, upper = (torch.randn(shape).to(dtype).transpose(1, 2) for _ in range(4))

    def run(function: Any, dtype: torch.dtype) -> Run:
        def call() -> Result:
            leaves = [x.to(dtype).detach().requires_grad_() for x in given]
            out: Tensor = function(*leaves, is_causal=causal, dropout_p=p)
            return torch.autograd.grad(out, leaves, upper.to(dtype))

        return call

    def exact() -> Result:
        with ops.use_backend("reference"):
            return run(ops.attention, torch.float64)()

    return Case(
        op="attention",
        name=f"forward + backward {NAMES[dtype]}, dropout {p:g}" + ", causal" * causal,
        shape=f"{batch} × {heads} × {tokens} × {dim}",
        ours=run(ops.attention, dtype),
        peers={"torch": run(functional.scaled_dot_product_attention, dtype)},
        exact=exact,
        # What is kept, and its errors with it, is multiplied by 1 / (1 - p).
        tolerance=TOLERANCE[dtype] / (1 - p),
    )


def dropout(m: int, n: int, dtype: torch.dtype, *, p: float) -> Case:
    """Forward and backward."""
    x, upper = (torch.randn(m, n).to(dtype) for _ in range(2))

    def run(function: Any) -> Run:
        def call() -> Result:
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(function(leaf, p), leaf, upper)

        return call

    def exact() -> Result:
        return (dropped(upper.double(), p, new_seed(x.device)),)

    return Case(
        op="dropout",
        name=f"forward + backward {NAMES[dtype]}, {p:g}",
        shape=f"{m} × {n}",
        ours=run(ops.dropout),
        peers={"torch": run(functional.dropout)},
        exact=exact,
        tolerance=torch.finfo(dtype).eps,
    )


def attention_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    """A layer of MiniLM, whatever the caller's sizes of a weight."""
    for batch, tokens in ((4, 128), (1, 512)) if full else ((4, 128),):
        yield attention(batch, 12, tokens, 32, torch.float32, p=0.1, causal=False)
    if full:
        yield attention(4, 12, 128, 64, torch.float32, p=0.1, causal=True)
        yield attention(4, 12, 128, 32, torch.bfloat16, p=0.1, causal=False)


def dropout_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    for m, width in ((512, 384), (4096, 768)) if full else ((512, 384),):
        yield dropout(m, width, torch.float32, p=0.1)


def small_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Of odd sizes: for `fusetune verify`."""
    for causal in (False, True):
        yield attention(2, 3, 50, 20, dtype, p=0.3, causal=causal)
    yield dropout(7, 37, dtype, p=0.3)
