"""What checks the GPU kernels, on a card or simulated: one or two ops that a kernel is part of.

Interpreted, a case takes about a second, so they are few: every kernel in every dtype, ragged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fusetune import ops
from fusetune.ops import _gpu_choice
from fusetune.reference import dora_norm as dora_reference
from fusetune.reference import merge_lora as merge_reference
from fusetune.reference.dequantize_4bit import dequantize_4bit as dense_of

from .bottleneck_cases import bottleneck
from .cases import EXACT, NAMES, cross_entropy, quantized
from .dora_cases import dora_linear
from .fusion_cases import adapter_fusion
from .glu_cases import glu
from .group_cases import lora_linear_group
from .ia3_cases import ia3_linear
from .loss_cases import linear_cross_entropy
from .multi_lora_cases import multi_lora_linear
from .prefix_cases import prefix_attention
from .prompt_cases import prompt_embed
from .rms_norm_cases import rms_norm
from .rotary_cases import rotary
from .timing import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Tensor = torch.Tensor


def triton_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        yield dequantize_4bit(33, 328, dtype)
        yield merge_lora(33, 328, dtype, rank=5)
        yield dora_norm(50, 328, dtype, rank=5)
        yield dora_linear(37, 40, 104, dtype, rank=5, dropout=0.0, dense=False)
        yield dora_linear(9, 40, 104, dtype, rank=5, dropout=0.3, dense=False)
        yield ia3_linear(9, 40, 104, dtype, feedforward=False, dense=False)
        yield linear(9, 40, 72, dtype, "triton")
        yield lora(70, 72, 200, dtype, "triton", dropout=0.3)
        yield lora(19, 40, 104, dtype, "addmm", rank=20, dropout=0.3)
        yield lora(19, 40, 104, dtype, "augmented", dense=True)
        yield bottleneck(37, 104, 20, dtype, activation="gelu", dropout=0.3)
        yield bottleneck(40, 72, 5, dtype, rows=[7, 0, 33])
        yield glu(9, 520, dtype, "gelu_new")
        yield rms_norm(5, 520, dtype)
        yield rotary(2, 3, 1, 5, 40, dtype)
        yield cross_entropy(5, 5000, dtype)
        yield linear_cross_entropy(5, 40, 5000, dtype)
        yield lora_linear_group(9, (40, 24), 72, dtype, rank=5, dropout=0.3, dense=True)
        yield several(5, 3, dtype, by_row=True, dense=False)
        yield several(3, 30, dtype, by_row=False, dense=True)
        yield adapter_fusion(9, 3, 72, dtype, train=True, dropout=0.3)
        yield prefix_attention(2, 4, 2, 9, 9, 20, 7, dtype, train=True)
        options: dict[str, Any] = {"dropout": 0.3, "rows": [1, -1, 0]}
        yield prefix_attention(3, 2, 2, 5, 8, 40, 20, dtype, train=True, **options)
        yield prompt_embed(3, 5, 4, 40, 50, dtype, rows=[1, -1, 0], positions=[0, 2, 3, 7])


def cuda_cases() -> Iterator[Case]:
    """K is a multiple of 32, as the kernels need it; rows below, at and across their tiles."""
    for dtype in DTYPES:
        yield dequantize_4bit(33, 328, dtype)
        for m in (1, 6) if dtype == torch.float32 else (1, 6, 37, 130):
            yield linear(m, 72, 352, dtype, "cuda")
        yield linear(20, 40, 2048, dtype, "cuda")  # few columns: parts of K are summed apart
        yield lora(6, 72, 352, dtype, "cuda", dropout=0.3)
        yield lora(37, 72, 160, dtype, "cuda", rank=20)


def dequantize_4bit(n: int, k: int, dtype: torch.dtype) -> Case:
    w = quantized(n, k, double_quant=True)
    return Case(
        op="dequantize_4bit",
        name=f"{NAMES[dtype]}, double quant",
        shape=f"{n} × {k}",
        ours=lambda: ops.dequantize_4bit(w, dtype),
        peers={},
        exact=lambda: dense_of(w, torch.float64),
        tolerance=EXACT[dtype],
    )


def linear(m: int, n: int, k: int, dtype: torch.dtype, way: str) -> Case:
    """y and dx of a 4-bit layer with a bias."""
    w = quantized(n, k, double_quant=True)
    x, dy, bias = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype), torch.randn(n)

    def both(x: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        y = ops.linear_4bit(x, w, bias.to(x.dtype))
        return y.detach(), *torch.autograd.grad(y, x, dy.to(x.dtype))

    return Case(
        op="linear_4bit",
        name=f"forward, dX {NAMES[dtype]} ({way})",
        shape=f"{m} × {n} × {k}",
        ours=lambda: _by(way, both, x),
        peers={},
        exact=lambda: _reference(both, x.double()),
        tolerance=2 * EXACT[dtype],  # the weight is rounded too, and the bias
    )


def lora(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    way: str,
    *,
    rank: int = 5,
    dropout: float = 0.0,
    dense: bool = False,
) -> Case:
    """y of a LoRA layer with both biases, and the gradient of everything that has one."""
    w = quantized(n, k, double_quant=True)
    weight: Any = w if not dense else ops.dequantize_4bit(w, dtype)
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    a, b = torch.randn(rank, k) / k**0.5, torch.randn(n, rank) / rank**0.5
    bias, lora_bias = torch.randn(n).to(dtype), torch.randn(n)

    def all_of(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        x, a, b, bias, lora_bias = leaves
        layer = weight.to(x.dtype) if dense else weight
        options: dict[str, Any] = {"bias": bias, "lora_bias": lora_bias, "dropout_p": dropout}
        y = ops.lora_linear(x, layer, a, b, 2.0, **options)
        return y.detach(), *torch.autograd.grad(y, leaves, dy.to(x.dtype))

    inputs = (x, a, b, bias, lora_bias)
    notes = f", dropout {dropout:g}" if dropout else ""
    kind = "dense" if dense else "NF4"
    return Case(
        op="lora_linear",
        name=f"y, gradients {NAMES[dtype]} {kind}, r={rank}{notes} ({way})",
        shape=f"{m} × {n} × {k}",
        ours=lambda: _by(way, all_of, *inputs),
        peers={},
        exact=lambda: _reference(all_of, *(tensor.double() for tensor in inputs)),
        tolerance=4 * EXACT[dtype],  # up to four roundings in a row: s, ds, product, sum
    )


def several(rows: int, tokens: int, dtype: torch.dtype, *, by_row: bool, dense: bool) -> Case:
    """Of few vectors, and of more than 64, of which the base matmul is the vendor's."""
    return multi_lora_linear(
        rows, tokens, 40, 104, dtype, ranks=[5, 20], dropout=0.3, dense=dense, by_row=by_row
    )


def merge_lora(n: int, k: int, dtype: torch.dtype, *, rank: int) -> Case:
    w = quantized(n, k, double_quant=True)
    a, b = (torch.randn(rank, k) / k**0.5).to(dtype), torch.randn(n, rank).to(dtype)
    return Case(
        op="merge_lora",
        name=f"{NAMES[dtype]}, r={rank}",
        shape=f"{n} × {k}",
        ours=lambda: ops.merge_lora(w, a, b, 2.0, dtype),
        peers={},
        exact=lambda: merge_reference.merged(w, a, b, 2.0, torch.float64),
        tolerance=EXACT[dtype],
    )


def dora_norm(n: int, k: int, dtype: torch.dtype, *, rank: int) -> Case:
    w = quantized(n, k, double_quant=True)
    a, b = (torch.randn(rank, k) / k**0.5).to(dtype), torch.randn(n, rank).to(dtype)
    return Case(
        op="dora_norm",
        name=f"{NAMES[dtype]} adapters, r={rank}",
        shape=f"{n} × {k}",
        ours=lambda: ops.dora_norm(w, a, b, 2.0),
        peers={},
        exact=lambda: dora_reference.dora_norm(w, a.double(), b.double(), 2.0),
        tolerance=EXACT[torch.float32],
    )


def _by(way: str, function: Callable[..., Any], *args: Tensor) -> Any:
    with _gpu_choice.use_way(way):
        return function(*args)


def _reference(function: Callable[..., Any], *args: Tensor) -> Any:
    with ops.use_backend("reference"):
        return function(*args)
