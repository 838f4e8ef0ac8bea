"""Inputs of glu, PyTorch's operators, and when two results agree: for test_glu and test_glu_gpu."""

from functools import partial

import torch
from tolerance import assert_close
from torch.nn import functional as F

from fusetune.ops import glu
from fusetune.reference.bottleneck import ACTIVATIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FUNCTIONS = ["silu", "gelu", "gelu_new"]
_EAGER = {"silu": F.silu, "gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh")}


def eager(gate, up, activation="silu"):
    return _EAGER[activation](gate) * up


def inputs(*shape, dtype=torch.float32, scale=3.0):
    return [(scale * torch.randn(*shape)).to(dtype) for _ in range(3)]


def all_of(function, gate, up, dy, *activation):
    gate, up = (tensor.detach().requires_grad_() for tensor in (gate, up))
    y = function(gate, up, *activation)
    return y.detach(), *torch.autograd.grad(y, (gate, up), dy)


def assert_as_good_as_eager(activation, gate, up, dy):
    got = all_of(glu, gate, up, dy, activation)
    exact = all_of(eager, *(tensor.double() for tensor in (gate, up, dy)), activation)
    # dgate's slope is a sum of two terms of opposite signs: rounded by the larger ones.
    z = gate.double()
    first = _first_term(z, activation)
    slope = first.abs() + (ACTIVATIONS[activation][1](z) - first).abs()
    sizes = (exact[0].abs(), (dy.double() * up.double()).abs() * slope, exact[2].abs())
    rounded = all_of(eager, gate, up, dy, activation)
    for name, *tensors in zip(("y", "dgate", "dup"), got, exact, rounded, sizes, strict=True):
        assert_close(name, *tensors)


def _first_term(z, activation):
    """f(z) / z: what of the slope does not come from the derivative of the gate's own gate."""
    if activation == "silu":
        return z.sigmoid()
    return torch.where(z == 0, 0.5, ACTIVATIONS[activation][0](z) / z)
