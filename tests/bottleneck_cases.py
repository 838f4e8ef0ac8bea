"""Inputs of bottleneck, its exact results, and what eager PyTorch makes of them."""

import torch
from tolerance import assert_close, one_thread
from torch.nn import functional as F

from fusetune import ops
from fusetune.reference.dropout import keep_mask, new_seed

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("x", "down_weight", "down_bias", "up_weight", "up_bias", "scaling", "residual")
FUNCTIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "leakyrelu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda z: z,
}


def make(m, h, d, dtype=torch.float32, groups=(), weights=torch.float32, **changes):
    """Arguments of bottleneck. `groups`: () or (G,); x and the residual are in `dtype`."""
    return {
        "x": torch.randn(m, h).to(dtype),
        "down_weight": (torch.randn(*groups, d, h) / h**0.5).to(weights),
        "down_bias": torch.randn(*groups, d).to(weights),
        "up_weight": (torch.randn(*groups, h, d) / d**0.5).to(weights),
        "up_bias": torch.randn(*groups, h).to(weights),
        "residual": torch.randn(m, h).to(dtype),
        **changes,
    }


def leaves(arguments, convert=lambda tensor: tensor):
    """The same arguments with new leaves that require grad for tensors; "same" stays x."""
    made = {
        name: convert(value).detach().clone().requires_grad_()
        if isinstance(value, torch.Tensor)
        else value
        for name, value in arguments.items()
    }
    if isinstance(made.get("residual"), str):
        made["residual"] = made["x"]
    return made


def results(function, arguments, dy, convert=lambda tensor: tensor):
    """y and the gradient of every tensor argument, by name."""
    arguments = leaves(arguments, convert)
    y = function(**arguments)
    y.backward(convert(dy))
    grads = {
        f"d_{name}": value.grad
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor)
    }
    return {"y": y.detach(), **grads}


def eager(
    x,
    down_weight,
    down_bias,
    up_weight,
    up_bias,
    *,
    activation="relu",
    scaling=1.0,
    residual=None,
    dropout_p=0.0,
    rows=None,
):
    """The definition, one PyTorch operation after another in x's dtype, group by group."""
    parameters = (down_weight, down_bias, up_weight, up_bias)
    if rows is None:
        rows, parameters = [x.shape[0]], [None if p is None else p[None] for p in parameters]
    parameters = [None if p is None else p.to(x.dtype) for p in parameters]
    branches = []
    for g, part in enumerate(x.split(list(rows))):
        down, down_bias, up, up_bias = (None if p is None else p[g] for p in parameters)
        own = scaling
        if isinstance(scaling, torch.Tensor):
            own = (scaling[g] if scaling.dim() == 2 else scaling).to(x.dtype)
        hidden = FUNCTIONS[activation](F.linear(part, down, down_bias))
        branches.append(F.linear(hidden, up, up_bias) * own)
    y = torch.cat(branches)
    if dropout_p:
        y = y * keep_mask(*x.shape, dropout_p, new_seed(x.device)) / (1 - dropout_p)
    return (y if residual is None else y + residual).to(x.dtype)


def magnitudes(arguments, dy):
    """What rounding errors scale with: sums of absolute values.

    Activations have slopes of about 1 at most, and so much curvature: an error of z reaches f' too.
    """
    a = leaves(arguments, lambda tensor: tensor.double().abs())
    keep = 1 / (1 - a.pop("dropout_p", 0.0))
    activation = a.pop("activation", "relu")
    scaling = a.get("scaling", 1.0)
    z = {}

    def linear(x, weight, bias):
        return F.linear(x, weight, bias)

    rows = a.pop("rows", None)
    grouped = rows is not None
    parts = []
    for g, x in enumerate(a["x"].split(list(rows) if grouped else [a["x"].shape[0]])):
        own = [
            a[n] if a[n] is None or not grouped else a[n][g]
            for n in ("down_weight", "down_bias", "up_weight", "up_bias")
        ]
        s = scaling
        if isinstance(s, torch.Tensor) and s.dim() == 2:
            s = s[g]
        z = linear(x, own[0], own[1])
        # Twice z: its error comes with the slope and with the curvature.
        z = z * (1 + z) + (1.0 if activation == "sigmoid" else 0.0)
        parts.append(linear(z, own[2], own[3]) * abs(s) * keep)
    y = torch.cat(parts)
    if a["residual"] is not None:
        y = y + a["residual"]
    y.backward(dy.double().abs())
    grads = {
        f"d_{name}": value.grad for name, value in a.items() if isinstance(value, torch.Tensor)
    }
    return {"y": y.detach(), **grads}


def check(arguments):
    """bottleneck and its gradients against float64, in the measure of what eager makes."""
    dy = torch.randn(arguments["x"].shape).to(arguments["x"].dtype)
    seed = int(torch.randint(2**31, (), device="cpu"))

    def run(function, *others):
        torch.manual_seed(seed)  # the same mask in all of them
        return results(function, arguments, dy, *others)

    got = run(ops.bottleneck)
    with one_thread():
        with ops.use_backend("reference"):
            exact = run(ops.bottleneck, lambda tensor: tensor.double())
        plain = run(eager)
        sizes = magnitudes(arguments, dy)
    assert got.keys() == exact.keys() == plain.keys()
    for name in got:
        assert_close(name, got[name], exact[name], plain[name], sizes[name])
