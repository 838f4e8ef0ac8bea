"""What is measured: the cases of each op, a short selection or all that the README shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .attention_cases import attention_cases, dropout_cases
from .bottleneck_cases import bottleneck_cases
from .cases import (
    cross_entropy,
    dequantize_4bit,
    linear_4bit,
    linear_4bit_dx,
    lora_linear,
    quantize_4bit,
)
from .dora_cases import dora_linear_cases
from .fusion_cases import adapter_fusion_cases
from .glu_cases import geglu_cases, swiglu_cases
from .group_cases import lora_linear_group_cases
from .ia3_cases import ia3_linear_cases, trained_bias_cases
from .lora_layer_cases import (
    lora_embedding_cases,
    lora_grouped_linear_cases,
    lora_up_cases,
    transposed_linear_cases,
)
from .loss_cases import linear_cross_entropy_cases
from .prefix_cases import prefix_attention_cases
from .prompt_cases import prompt_embed_cases
from .rms_norm_cases import rms_norm_cases
from .rotary_cases import rotary_cases
from .timing import Case

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def cases_of(op: str, full: bool, n: int = 4096, k: int = 4096) -> Iterator[Case]:
    """The cases of an op, made one by one. `full` is what the README shows.

    Raises ValueError for an unknown op.
    """
    if op not in OPS:
        raise ValueError(f"op: must be one of {', '.join(OPS)}, got {op!r}")
    return OPS[op](full, n, k)


def linear_4bit_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    for m in (1, 8, 32, 128, 512) if full else (1, 8, 128):
        yield linear_4bit(m, n, k, FP32)
    for m in (1, 8) if full else (1,):
        yield linear_4bit(m, n, k, FP32, int16=True)
    for m in (8, 32, 128, 512) if full else (128,):
        yield linear_4bit_dx(m, n, k, FP32)
    if not full:
        return
    yield linear_4bit(1, n, k, FP32, double_quant=True)
    yield linear_4bit(32, n, k, FP32, double_quant=True)
    for m in (1, 8, 32, 128, 512):
        yield linear_4bit(m, n, k, BF16)
    yield linear_4bit(128, n, k, FP16)
    yield linear_4bit_dx(128, n, k, BF16)


def lora_linear_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    for dense in (False, True):
        for m in (128, 512) if full else (128,):
            for dropout in (0.0, 0.05):
                yield lora_linear(m, n, k, FP32, rank=16, dropout=dropout, dense=dense, train=True)
        for m in (1, 32) if full else (1,):
            yield lora_linear(m, n, k, FP32, rank=16, dropout=0.0, dense=dense, train=False)
    if full:
        yield lora_linear(512, n, k, FP32, rank=64, dropout=0.05, dense=False, train=True)
        yield lora_linear(512, n, k, BF16, rank=16, dropout=0.05, dense=False, train=True)
    yield from transposed_linear_cases(full, n, k)


def quantize_4bit_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    for dtype in (FP32, BF16, FP16) if full else (FP32,):
        yield quantize_4bit(n, k, dtype)
    if full:
        yield quantize_4bit(n, k, FP32, double_quant=True)


def dequantize_4bit_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    for dtype in (FP32, BF16, FP16) if full else (FP32,):
        yield dequantize_4bit(n, k, dtype)
    if full:
        yield dequantize_4bit(n, k, FP32, double_quant=True)


def cross_entropy_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    for dtype in (FP32, BF16) if full else (FP32,):
        yield cross_entropy(512, 12 * n, dtype)


OPS: dict[str, Callable[[bool, int, int], Iterator[Case]]] = {
    "linear_4bit": linear_4bit_cases,
    "lora_linear": lora_linear_cases,
    "lora_linear_group": lora_linear_group_cases,
    "dora_linear": dora_linear_cases,
    "lora_embedding": lora_embedding_cases,
    "lora_up": lora_up_cases,
    "lora_grouped_linear": lora_grouped_linear_cases,
    "quantize_4bit": quantize_4bit_cases,
    "dequantize_4bit": dequantize_4bit_cases,
    "cross_entropy": cross_entropy_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
    "bottleneck": bottleneck_cases,
    "adapter_fusion": adapter_fusion_cases,
    "attention": attention_cases,
    "dropout": dropout_cases,
    "prefix_attention": prefix_attention_cases,
    "prompt_embed": prompt_embed_cases,
    "rms_norm": rms_norm_cases,
    "rotary": rotary_cases,
    "swiglu": swiglu_cases,
    "geglu": geglu_cases,
    "ia3_linear": ia3_linear_cases,
    "trained_bias": trained_bias_cases,
}
