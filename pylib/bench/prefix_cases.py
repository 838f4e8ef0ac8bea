"""What is measured of prefix attention: one layer, against keys and values joined by torch.cat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from fusetune import ops

from .timing import Case, Result, Run

Tensor = torch.Tensor
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# A score sums D products; its rounding errors, and those of a 16-bit result, come to gradients.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


def prefix_attention(
    batch: int,
    heads: int,
    kv_heads: int,
    tokens: int,
    keys: int,
    dim: int,
    prefix: int,
    dtype: torch.dtype,
    *,
    train: bool,
    dropout: float = 0.0,
    rows: list[int] | None = None,
    window: int | None = None,
) -> Case:
    """Causal where there are as many tokens as keys: forward, or forward and backward to all.

    rows: several prefixes, in fp32, and which of them each row of the batch has.
    """
    # As a model has them: heads behind tokens, and a layer's prefix in PEFT's flat weight.
    query, upper = (_behind(torch.randn(batch, tokens, heads, dim).to(dtype)) for _ in range(2))
    key, value = (_behind(torch.randn(batch, keys, kv_heads, dim).to(dtype)) for _ in range(2))
    if tokens == 1:  # a cache has them as they are attended to
        key, value = key.contiguous(), value.contiguous()
    groups = max(rows) + 1 if rows else 1
    flat = torch.randn(groups, prefix, 6, kv_heads, dim)
    causal = tokens == keys and tokens > 1
    options: dict[str, Any] = {"window": window, "prefix_dropout_p": dropout, "is_causal": causal}
    if rows:
        options["rows"] = torch.tensor(rows)
    seen = torch.ones(tokens, keys, dtype=torch.bool).tril()
    mask = torch.cat([torch.ones(tokens, prefix, dtype=torch.bool), seen], 1) if causal else None

    def run(attention: Any, dtype: torch.dtype, prefix_dtype: torch.dtype) -> Run:
        given = [x.to(dtype) for x in (query, key, value)]
        given.append(flat.to(prefix_dtype))

        def call() -> Result:
            leaves = [x.detach().requires_grad_(train) for x in given]
            with torch.set_grad_enabled(train):
                out: Tensor = attention(*leaves[:3], leaves[3][:, :, 2], leaves[3][:, :, 3])
            return torch.autograd.grad(out, leaves, upper.to(dtype)) if train else out

        return call

    def ours(*tensors: Tensor) -> Tensor:
        return ops.prefix_attention(*tensors, **options)

    def joined(query: Tensor, key: Tensor, value: Tensor, first: Tensor, second: Tensor) -> Tensor:
        first, second = (x[0].transpose(0, 1).to(key.dtype) for x in (first, second))
        key = torch.cat([first.expand(batch, -1, -1, -1), key], 2)
        value = torch.cat([second.expand(batch, -1, -1, -1), value], 2)
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=True
        )

    def exact() -> Result:
        with ops.use_backend("reference"):
            return run(ours, torch.float64, torch.float64)()

    notes = "".join((f", dropout {dropout:g}" if dropout else "", ", a prefix a row" * bool(rows)))
    plain = not (dropout or rows or window)
    return Case(
        op="prefix_attention",
        name=f"{'forward + backward' if train else 'forward'} {NAMES[dtype]}, P={prefix}{notes}",
        shape=f"{batch} × {heads} × {tokens} × {keys} × {dim}",
        ours=run(ours, dtype, torch.float32),
        peers={"torch": run(joined, dtype, torch.float32)} if plain else {},
        exact=run(joined, torch.float64, torch.float64) if plain else exact,
        # What is kept of the prefix, and its errors with it, is multiplied by 1 / (1 - dropout).
        tolerance=TOLERANCE[dtype] / (1 - dropout),
    )


def _behind(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def prefix_attention_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    """A layer of SmolLM2-135M, whatever the caller's sizes of a weight: prefill, and a token."""
    for tokens, prefix in ((512, 32), (128, 30), (128, 128)) if full else ((512, 32),):
        sizes = (8, 9, 3, tokens, tokens, 64, prefix)
        for train in (False, True):
            yield prefix_attention(*sizes, torch.float32, train=train)
    yield prefix_attention(8, 9, 3, 1, 512, 64, 32, torch.float32, train=False)
    if full:
        yield prefix_attention(8, 9, 3, 512, 512, 64, 32, torch.bfloat16, train=True)


def small_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Of odd sizes, with all that a kernel does: for `fusetune verify`."""
    yield prefix_attention(2, 6, 2, 70, 70, 20, 7, dtype, train=True)
    yield prefix_attention(3, 4, 4, 9, 5, 64, 33, dtype, train=True, dropout=0.3, window=40)
    rows = [1, -1, 0, 0]
    yield prefix_attention(4, 3, 1, 50, 50, 37, 18, dtype, train=True, rows=rows)
