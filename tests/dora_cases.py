"""Inputs of dora_linear, its exact results, and what eager PEFT makes of them."""

import torch
from lora_cases import WEIGHTS, absolute, to_float64
from tolerance import assert_close, one_thread
from torch.nn.functional import linear

from fusetune import ops
from fusetune.reference.dropout import dropout, new_seed

NAMES = ("x", "lora_A", "lora_B", "magnitude", "bias")


def make(m, n, k, r, dtype=torch.float32, kind="nf4", adapter=torch.float32):
    """Arguments: activations, weight and bias in `dtype`, the rest in `adapter`.

    Magnitudes are 0.5 to 1.5 of a norm or so; one is zero and one negative, where there are enough.
    """
    magnitude = (torch.rand(n) + 0.5) * k**0.5
    magnitude[1:2] = 0
    magnitude[2:3] *= -1
    return {
        "x": torch.randn(m, k).to(dtype),
        "weight": WEIGHTS[kind](torch.randn(n, k).to(dtype)),
        "lora_A": torch.randn(r, k).to(adapter) / k**0.5,
        "lora_B": torch.randn(n, r).to(adapter) / r**0.5,
        "scaling": 1.5,
        "magnitude": magnitude.to(adapter),
        "bias": torch.randn(n).to(dtype),
    }


def leaves(arguments, names=NAMES):
    """The same arguments with new leaves that require grad in place of those of `names`."""
    return {
        name: value.detach().clone().requires_grad_()
        if name in names and value is not None
        else value
        for name, value in arguments.items()
    }


def eager(x, weight, lora_A, lora_B, scaling, magnitude, bias, *, dropout_p=0.0, seed=None):
    """As PEFT 0.21 computes it: the base layer, then what is added to it in the adapter's dtype."""
    dense = weight if isinstance(weight, torch.Tensor) else ops.dequantize_4bit(weight, x.dtype)
    result = linear(x, dense, bias)
    low, dense = x.to(lora_A.dtype), dense.to(lora_A.dtype)
    norm = (dense + scaling * (lora_B @ lora_A).detach()).norm(dim=1)
    c = magnitude / norm
    if seed is None:
        base = result if bias is None else result - bias
    else:
        low = dropout(low, dropout_p, seed)
        base = linear(low, dense)
    delta = (c - 1) * base + c * linear(linear(low, lora_A), lora_B) * scaling
    return (result + delta).to(x.dtype)


def results(function, arguments, dy, names=NAMES, **options):
    """y and the gradient of every argument of `names`, by name."""
    arguments = leaves(arguments, names)
    y = function(**arguments, **options)
    y.backward(dy)
    grads = {f"d{n}": arguments[n].grad for n in names if arguments[n] is not None}
    return {"y": y.detach(), **grads}


def check(arguments, dropout_p=0.0):
    m, n = arguments["x"].shape[0], arguments["lora_B"].shape[0]
    dy = torch.randn(m, n).to(arguments["x"].dtype)
    seed = int(torch.randint(2**31, (), device="cpu"))

    def run(function, arguments, dy, **options):
        torch.manual_seed(seed)  # the same mask in all of them
        return results(function, arguments, dy, **options)

    got = run(ops.dora_linear, arguments, dy, dropout_p=dropout_p)
    with one_thread(), ops.use_backend("reference"):
        true = to_float64(arguments)
        exact = run(ops.dora_linear, true, dy.double(), dropout_p=dropout_p)
        torch.manual_seed(seed)
        drop = {"dropout_p": dropout_p, "seed": new_seed(dy.device)} if dropout_p else {}
        plain = run(eager, arguments, dy, **drop)
        magnitude = sizes(true, dy, dropout_p)
    if dy.dtype != torch.float32:
        # z, which this sums, was rounded to the dtype of y: eps / 2 instead of 2 of fp32's.
        rounding = torch.finfo(dy.dtype).eps / (4 * torch.finfo(torch.float32).eps)
        magnitude["dmagnitude"] = magnitude["dmagnitude"] * rounding
        # dz = c dy is rounded; with dropout so are the two products that dx is the sum of.
        magnitude["dx"] = magnitude["dx"] * rounding * (2 if dropout_p else 1)
    for name in got:
        assert_close(name, got[name], exact[name], plain[name], magnitude[name])


def sizes(true, dy, dropout_p):
    """What rounding errors scale with: the computation on absolute values, with nothing dropped;
    with dropout every base product is made twice."""
    parts = ("weight", "lora_A", "lora_B", "scaling")
    norm = ops.dora_norm(*(true[name] for name in parts))
    positive = absolute(true)
    factor = 1 / (1 - dropout_p) if dropout_p else 1
    positive["x"] = positive["x"] * factor
    found = results(ops.dora_linear, positive, dy.double().abs() * factor, norm=norm)
    if not dropout_p:
        return found
    base = positive | {"magnitude": norm, "lora_B": 0 * positive["lora_B"]}
    twice = results(ops.dora_linear, base, dy.double().abs() * factor, norm=norm)
    return found | {name: found[name] + 2 * twice[name] for name in ("y", "dx")}
