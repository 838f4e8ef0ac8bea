"""Inputs of multi_lora_linear, its exact results, and what eager PEFT makes of them."""

import torch
from lora_cases import WEIGHTS
from tolerance import assert_close, one_thread
from torch.nn.functional import linear

from fusetune import ops
from fusetune.reference.dropout import keep_mask, new_seed

LISTS = ("lora_A", "lora_B", "lora_bias")


def make(shape, n, k, ranks, dtype=torch.float32, kind="nf4", adapter=torch.float32):
    """Arguments of multi_lora_linear: x [*shape, k], weight and bias in `dtype`, the rest in
    `adapter`; the second adapter has no bias of its own."""
    return {
        "x": torch.randn(*shape, k).to(dtype),
        "weight": WEIGHTS[kind](torch.randn(n, k).to(dtype)),
        "lora_A": [torch.randn(r, k).to(adapter) / k**0.5 for r in ranks],
        "lora_B": [torch.randn(n, r).to(adapter) / r**0.5 for r in ranks],
        "scaling": [1.5, 0.5, 2.0, 1.0][: len(ranks)],
        "bias": torch.randn(n).to(dtype),
        "lora_bias": [None if i == 1 else torch.randn(n).to(adapter) for i in range(len(ranks))],
    }


def mapped(arguments, function):
    """The arguments with function(tensor) in place of every tensor but a 4-bit weight."""

    def value_of(value):
        if isinstance(value, list):
            return [value_of(entry) for entry in value]
        return function(value) if isinstance(value, torch.Tensor) else value

    return {name: value_of(value) for name, value in arguments.items()}


def leaves(arguments):
    """With new leaves that require grad in place of the differentiable ones."""
    weight = arguments["weight"]
    return mapped(arguments, lambda t: t.detach().clone().requires_grad_()) | {"weight": weight}


def named_tensors(arguments):
    """{name: tensor} of the differentiable arguments."""
    named = {"x": arguments["x"], "bias": arguments.get("bias")}
    for name in LISTS:
        entries = arguments.get(name) or []
        named |= {f"{name}[{i}]": tensor for i, tensor in enumerate(entries)}
    return {name: tensor for name, tensor in named.items() if isinstance(tensor, torch.Tensor)}


def results(function, arguments, dy, **options):
    """y and the gradient of every differentiable argument, by name."""
    arguments = leaves(arguments)
    y = function(**arguments, **options)
    y.backward(dy)
    grads = {f"d{name}": tensor.grad for name, tensor in named_tensors(arguments).items()}
    return {"y": y.detach(), **grads}


def eager(x, weight, lora_A, lora_B, scaling, bias, lora_bias, *, adapter_of=None, dropout_p=0.0):
    """What PEFT computes, adapter by adapter: the base layer in x's dtype, adapters in theirs."""
    count = len(lora_A)
    chances = dropout_p if isinstance(dropout_p, list) else [dropout_p] * count
    seeds = new_seed(x.device, count) if any(chances) else None
    dense = weight if isinstance(weight, torch.Tensor) else ops.dequantize_4bit(weight, x.dtype)
    result = linear(x, dense, bias)
    k = x.shape[-1]
    parts = []
    for i, p in enumerate(chances):
        low = x.to(lora_A[i].dtype)
        if p:
            kept = keep_mask(x.numel() // k, k, p, seeds[i]).view(x.shape)
            low = low * kept / (1 - p)
        part = linear(linear(low, lora_A[i]), lora_B[i], lora_bias[i]) * scaling[i]
        if adapter_of is not None:
            mine = torch.tensor([owner == i for owner in adapter_of])
            part = part * mine.view(-1, *[1] * (x.dim() - 1))
        parts.append(part)
    return (result + sum(parts)).to(x.dtype)


def absolute(arguments):
    weight = arguments["weight"]
    if not isinstance(weight, torch.Tensor):
        weight = ops.dequantize_4bit(weight, torch.float64)
    return mapped(arguments | {"weight": weight}, torch.Tensor.abs)


def check(arguments, **options):
    """The op against its reference in float64, errors measured by those of eager PEFT."""
    shape = (*arguments["x"].shape[:-1], len(arguments["bias"]))
    dy = torch.randn(shape).to(arguments["x"].dtype)
    seed = int(torch.randint(2**31, ()))

    def run(function, arguments, dy):
        torch.manual_seed(seed)  # the same masks in all of them
        return results(function, arguments, dy, **options)

    got = run(ops.multi_lora_linear, arguments, dy)
    in_double = mapped(arguments, torch.Tensor.double)
    with one_thread(), ops.use_backend("reference"):
        exact = run(ops.multi_lora_linear, in_double, dy.double())
        magnitude = run(ops.multi_lora_linear, absolute(in_double), dy.double().abs())
        plain = run(eager, arguments, dy)
    for name in got:
        assert_close(name, got[name], exact[name], plain[name], magnitude[name])
