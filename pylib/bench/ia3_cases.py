"""What is measured of IA3, against PEFT's layer, and of BitFit: the gradient of a bias."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fusetune import QuantizedWeight, ops
from fusetune.ops._trained_bias import trained_bias
from fusetune.reference.dequantize_4bit import dequantize_4bit as dense_of

from .cases import EXACT, NAMES
from .timing import Case, Result, Run

Tensor = torch.Tensor
HAS_PEFT = all(importlib.util.find_spec(name) is not None for name in ("bitsandbytes", "peft"))
# Up to three roundings in a row.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


def ia3_linear(
    m: int, n: int, k: int, dtype: torch.dtype, *, feedforward: bool, dense: bool
) -> Case:
    """Forward, and backward to x and the vector."""
    w = ops.quantize_4bit(torch.randn(n, k) / k**0.5, double_quant=True)
    weight: Any = dense_of(w, dtype) if dense else w
    scale = (torch.rand(k if feedforward else n) + 0.5).requires_grad_()
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)

    def step(forward: Callable[[Tensor], Tensor], x: Tensor, trained: Tensor) -> Result:
        x = x.detach().requires_grad_()
        y = forward(x)
        dx, dscale = torch.autograd.grad(y, [x, trained], dy.to(y.dtype))
        return y.detach(), dx, dscale.flatten()

    def fused(x: Tensor, scale: Tensor) -> Result:
        return step(lambda x: ops.ia3_linear(x, weight, scale, feedforward=feedforward), x, scale)

    def exact() -> Result:
        with ops.use_backend("reference"):
            return fused(x.double(), scale.detach().double().requires_grad_())

    peers: dict[str, Run] = {}
    if HAS_PEFT:
        layer = peft_layer(weight, dtype, scale, feedforward)
        trained = layer.ia3_l["default"]
        peers["PEFT" if dense else "PEFT + bitsandbytes"] = lambda: step(layer, x, trained)
    place = "input" if feedforward else "output"
    return Case(
        op="ia3_linear",
        name=f"forward + backward {NAMES[dtype]} {'dense' if dense else 'NF4'}, {place}",
        shape=f"{m} × {n} × {k}",
        ours=lambda: fused(x, scale),
        peers=peers,
        exact=exact,
        tolerance=TOLERANCE[dtype],
        flops=4.0 * m * n * k,
    )


def peft_layer(weight: Any, dtype: torch.dtype, scale: Tensor, feedforward: bool) -> Any:
    """PEFT's own layer with the same numbers in it."""
    import bitsandbytes
    from peft import IA3Config, inject_adapter_in_model

    n, k = weight.shape
    base: Any = torch.nn.Linear(k, n, bias=False, dtype=dtype)
    quantized = isinstance(weight, QuantizedWeight)
    if quantized:
        base = bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=dtype)
        base.weight = weight.to_bnb()
        base.quant_state = base.weight.quant_state
        base.support_avx512bf16_for_cpu = False  # it would pack its weight anew at inference
    else:
        base.weight = torch.nn.Parameter(weight, requires_grad=False)
    holder: Any = torch.nn.Sequential(base)
    holder.is_loaded_in_4bit = quantized
    config = IA3Config(target_modules=["0"], feedforward_modules=["0"] if feedforward else [])
    model: Any = inject_adapter_in_model(config, holder)
    layer = model[0]
    vector = layer.ia3_l["default"]
    vector.data = scale.detach().clone().view(vector.shape)
    return layer.train()


def bias_gradient(m: int, n: int, dtype: torch.dtype) -> Case:
    """The gradient of a bias in fp32 that a layer in `dtype` has added."""
    y, dy = torch.randn(m, n).to(dtype), torch.randn(m, n).to(dtype)
    bias = torch.randn(n, requires_grad=True)

    def eager() -> Result:
        return torch.autograd.grad(y + bias.to(dtype), bias, dy)

    return Case(
        op="trained_bias",
        name=f"backward {NAMES[dtype]}",
        shape=f"{m} × {n}",
        ours=lambda: torch.autograd.grad(trained_bias(y, bias), bias, dy),
        peers={"torch": eager},
        exact=lambda: (dy.double().sum(0),),
        tolerance=EXACT[torch.float32],
    )


def ia3_linear_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    for dense in (False, True):
        for feedforward in (False, True):
            for dtype in (torch.float32, torch.bfloat16) if full else (torch.float32,):
                yield ia3_linear(128, n, k, dtype, feedforward=feedforward, dense=dense)


def trained_bias_cases(full: bool, n: int, k: int) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        yield bias_gradient(1024, n, dtype)
