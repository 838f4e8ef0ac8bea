"""Inputs of lora_linear, its exact results, and what eager PEFT makes of them."""

import torch
from tolerance import assert_close, one_thread
from torch.nn.functional import linear

from fusetune import ops
from fusetune.reference.dropout import keep_mask, new_seed

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def quantized(weight, **options):
    """Whatever backend is forced: not all have a kernel for it."""
    with ops.use_backend("auto"):
        return ops.quantize_4bit(weight.float(), **options)


WEIGHTS = {
    "dense": lambda w: w,
    "transposed": lambda w: w.T.contiguous().T,  # as GPT-2's
    "nf4": quantized,
    "fp4 nested": lambda w: quantized(w, quant_type="fp4", double_quant=True),
}
NAMES = ("x", "lora_A", "lora_B", "bias", "lora_bias")


def make(m, n, k, r, dtype=torch.float32, kind="nf4", adapter=torch.float32):
    """Arguments of lora_linear: activations, weight and bias in `dtype`, the rest in `adapter`."""
    return {
        "x": torch.randn(m, k).to(dtype),
        "weight": WEIGHTS[kind](torch.randn(n, k).to(dtype)),
        "lora_A": torch.randn(r, k).to(adapter) / k**0.5,
        "lora_B": torch.randn(n, r).to(adapter) / r**0.5,
        "scaling": 1.5,
        "bias": torch.randn(n).to(dtype),
        "lora_bias": torch.randn(n).to(adapter),
    }


def leaves(arguments):
    """The same arguments with new leaves that require grad in place of the differentiable ones."""
    return {
        name: value.detach().clone().requires_grad_()
        if name in NAMES and value is not None
        else value
        for name, value in arguments.items()
    }


def to_float64(arguments):
    return {
        name: value.double() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def eager(x, weight, lora_A, lora_B, scaling, bias, lora_bias, *, dropout_p=0.0, seed=None):
    """What PEFT computes: the base layer in x's dtype, the adapter in its own."""
    dense = weight if isinstance(weight, torch.Tensor) else ops.dequantize_4bit(weight, x.dtype)
    low = x.to(lora_A.dtype)
    if seed is not None:
        low = low * keep_mask(*x.shape, dropout_p, seed) / (1 - dropout_p)
    delta = linear(linear(low, lora_A), lora_B, lora_bias) * scaling
    return (linear(x, dense, bias) + delta).to(x.dtype)


def results(function, arguments, dy, **options):
    """y and the gradient of every differentiable argument, by name."""
    arguments = leaves(arguments)
    y = function(**arguments, **options)
    y.backward(dy)
    grads = {f"d{n}": arguments[n].grad for n in NAMES if arguments[n] is not None}
    return {"y": y.detach(), **grads}


def absolute(arguments):
    """The arguments with absolute values, for the magnitude that rounding errors scale with."""
    weight = arguments["weight"]
    if not isinstance(weight, torch.Tensor):
        weight = ops.dequantize_4bit(weight, torch.float64)
    return {
        name: value.abs() if isinstance(value, torch.Tensor) else value
        for name, value in (arguments | {"weight": weight}).items()
    }


def check(arguments, dropout_p=0.0):
    m, n = arguments["x"].shape[0], arguments["lora_B"].shape[0]
    dy = torch.randn(m, n).to(arguments["x"].dtype)
    seed = int(torch.randint(2**31, (), device="cpu"))

    def run(function, arguments, dy, **options):
        torch.manual_seed(seed)  # the same mask in all of them
        return results(function, arguments, dy, dropout_p=dropout_p, **options)

    got = run(ops.lora_linear, arguments, dy)
    with one_thread(), ops.use_backend("reference"):
        exact = run(ops.lora_linear, to_float64(arguments), dy.double())
        magnitude = run(ops.lora_linear, absolute(to_float64(arguments)), dy.double().abs())
        torch.manual_seed(seed)
        plain = run(eager, arguments, dy, seed=new_seed(dy.device) if dropout_p else None)
    for name in got:
        assert_close(name, got[name], exact[name], plain[name], magnitude[name])
