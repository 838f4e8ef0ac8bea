"""Projections of one x: inputs of lora_linear_group, and what separate layers make of them."""

import torch
from lora_cases import WEIGHTS, absolute, eager, to_float64
from tolerance import assert_close, one_thread

from fusetune import ops
from fusetune.reference.dropout import new_seed

FIELDS = ("weight", "lora_A", "lora_B", "scaling", "bias", "lora_bias")
LEAVES = ("lora_A", "lora_B", "bias", "lora_bias")


def make(m, k, sizes, dtype=torch.float32, kinds=("nf4",), adapter=torch.float32, biases=True):
    """(x, arguments of each projection). sizes: (N, r, dropout) of each; kinds: their weights."""
    x = torch.randn(m, k).to(dtype)
    group = []
    for i, (n, r, p) in enumerate(sizes):
        biased = biases and i % 2 == 0
        group.append(
            {
                "weight": WEIGHTS[kinds[i % len(kinds)]](torch.randn(n, k).to(dtype)),
                "lora_A": torch.randn(r, k).to(adapter) / k**0.5,
                "lora_B": torch.randn(n, r).to(adapter) / r**0.5,
                "scaling": 1.5 / (i + 1),
                "bias": torch.randn(n).to(dtype) if biased else None,
                "lora_bias": torch.randn(n).to(adapter) if biased else None,
                "dropout_p": p,
            }
        )
    return x, group


def grouped(x, group):
    return ops.lora_linear_group(x, [ops.LoraProjection(**arguments) for arguments in group])


def separate(x, group):
    return [ops.lora_linear(x, **arguments) for arguments in group]


def plain(x, group):
    """PEFT's operators, with the masks that the ops draw in this order."""
    ys = []
    for arguments in group:
        rest = {name: value for name, value in arguments.items() if name != "dropout_p"}
        p = arguments["dropout_p"]
        ys.append(eager(x, **rest, dropout_p=p, seed=new_seed(x.device) if p else None))
    return ys


def results(function, x, group, dys, seed=3):
    """Every y and every gradient, by name. dys: None where a y is not used."""
    x = x.detach().clone().requires_grad_()
    group = [
        {
            name: value.detach().clone().requires_grad_()
            if name in LEAVES and value is not None
            else value
            for name, value in arguments.items()
        }
        for arguments in group
    ]
    torch.manual_seed(seed)
    ys = function(x, group)
    used = [(y, dy) for y, dy in zip(ys, dys, strict=True) if dy is not None]
    torch.autograd.backward(*zip(*used, strict=True))
    found = {f"y{i}": y.detach() for i, y in enumerate(ys)} | {"dx": x.grad}
    for i, arguments in enumerate(group):
        found |= {
            f"d{name}{i}": arguments[name].grad for name in LEAVES if arguments[name] is not None
        }
    return found


def gradients(x, group):
    sizes = [arguments["lora_B"].shape[0] for arguments in group]
    return [torch.randn(*x.shape[:-1], n).to(x.dtype) for n in sizes]


def check(x, group):
    dys = gradients(x, group)
    got = results(grouped, x, group, dys)
    up = [dy.double() for dy in dys]
    with one_thread(), ops.use_backend("reference"):
        doubles = [to_float64(arguments) for arguments in group]
        sizes = [to_float64(absolute(arguments)) for arguments in group]
        exact = results(separate, x.double(), doubles, up)
        magnitude = results(separate, x.double().abs(), sizes, [dy.abs() for dy in up])
        rounded = results(plain, x, group, dys)
    for name in got:
        assert_close(name, got[name], exact[name], rounded[name], magnitude[name])
