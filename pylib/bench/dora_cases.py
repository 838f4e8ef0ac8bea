"""What is measured of DoRA: a layer, against PEFT's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fusetune import QuantizedWeight, ops
from fusetune.reference.dequantize_4bit import dequantize_4bit as dense_of

from .timing import Case, Result, Run

Tensor = torch.Tensor
HAS_PEFT = all(importlib.util.find_spec(name) is not None for name in ("bitsandbytes", "peft"))
SCALING = 2.0
# As of LoRA's: up to four roundings in a row.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


def dora_linear(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    rank: int,
    dropout: float,
    dense: bool,
) -> Case:
    """Forward, and backward to x, lora_A, lora_B and the magnitude."""
    w = ops.quantize_4bit(torch.randn(n, k) / k**0.5, double_quant=True)
    weight: Any = dense_of(w, dtype) if dense else w
    a, b = torch.randn(rank, k) / k**0.5, torch.randn(n, rank)
    magnitude = ops.dora_norm(weight, a, b, SCALING) * (torch.rand(n) + 0.5)
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    parameters = [t.requires_grad_() for t in (a, b, magnitude)]

    def step(forward: Callable[[Tensor], Tensor], x: Tensor, trained: list[Tensor]) -> Result:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(forward(x), [x, *trained], dy.to(x.dtype))

    def fused(x: Tensor, trained: list[Tensor]) -> Result:
        a, b, magnitude = trained
        return step(
            lambda x: ops.dora_linear(x, weight, a, b, SCALING, magnitude, dropout_p=dropout),
            x,
            trained,
        )

    def exact() -> Result:
        doubles = [t.detach().double().requires_grad_() for t in parameters]
        with ops.use_backend("reference"):
            return fused(x.double(), doubles)

    peers: dict[str, Run] = {}
    if HAS_PEFT:
        layer, trained = peft_layer(weight, dtype, parameters, dropout)
        peers["PEFT" if dense else "PEFT + bitsandbytes"] = lambda: step(layer, x, trained)
    notes = f", dropout {dropout:g}" if dropout else ""
    return Case(
        op="dora_linear",
        name=f"forward + backward {str(dtype)[6:]} {'dense' if dense else 'NF4'}, r={rank}{notes}",
        shape=f"{m} × {n} × {k}",
        ours=lambda: fused(x, parameters),
        peers=peers,
        exact=exact,
        tolerance=TOLERANCE[dtype],
        flops=(8.0 if dropout else 4.0) * m * n * k,
    )


def peft_layer(
    weight: Any, dtype: torch.dtype, parameters: list[Tensor], dropout: float
) -> tuple[torch.nn.Module, list[Tensor]]:
    """PEFT's own layer with the same numbers in it, and its adapter's parameters."""
    import bitsandbytes
    from peft import LoraConfig, inject_adapter_in_model

    n, k = weight.shape
    base: Any = torch.nn.Linear(k, n, bias=False, dtype=dtype)
    if isinstance(weight, QuantizedWeight):
        base = bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=dtype)
        base.weight = weight.to_bnb()
        base.quant_state = base.weight.quant_state
        base.support_avx512bf16_for_cpu = False  # it would pack its weight anew at inference
    else:
        base.weight = torch.nn.Parameter(weight, requires_grad=False)
    rank = parameters[0].shape[0]
    config = LoraConfig(
        r=rank,
        lora_alpha=int(SCALING * rank),
        lora_dropout=dropout,
        target_modules=["0"],
        use_dora=True,
    )
    model: Any = inject_adapter_in_model(config, torch.nn.Sequential(base))
    layer = model[0].train()
    places = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    for place, value in zip(places, parameters, strict=True):
        place["default"].weight = torch.nn.Parameter(value.detach().clone())
    return layer, [place["default"].weight for place in places]


def dora_linear_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    for dense in (False, True):
        for m in (128, 512) if full else (128,):
            for p in (0.0, 0.05):
                yield dora_linear(m, n, k, torch.float32, rank=16, dropout=p, dense=dense)
