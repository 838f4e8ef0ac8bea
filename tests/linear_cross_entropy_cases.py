"""Inputs of linear_cross_entropy, torch's, and when they agree: for its tests."""

import torch
from cross_entropy_cases import eager_cross_entropy, magnitudes
from tolerance import assert_close
from torch.nn import functional as F

from fusetune.ops import linear_cross_entropy


def inputs(m, k, v, dtype=torch.float32, bias=False, ignored=True):
    x = torch.randn(m, k).to(dtype).requires_grad_()
    weight = torch.randn(v, k).to(dtype)
    target = torch.randint(0, v, (m,))
    if ignored and m > 1:
        target[::3] = -100
    return x, weight, target, torch.randn(v).to(dtype) if bias else None


def composed(x, weight, target, bias, **options):
    return eager_cross_entropy(F.linear(x, weight, bias), target, **options)


def in_float64(x, weight, target, bias, **options):
    bias = bias if bias is None else bias.double()
    return F.cross_entropy(F.linear(x, weight.double(), bias), target, **options)


def value_and_gradient(loss, x, *args, **options):
    value = loss(x, *args, **options)
    return value.detach(), torch.autograd.grad(value, x, torch.ones_like(value) * 1.5)[0]


def assert_as_good_as_eager(x, weight, target, bias, **options):
    args = (weight, target, bias)
    got = value_and_gradient(linear_cross_entropy, x, *args, **options)
    exact = value_and_gradient(in_float64, x.detach().double().requires_grad_(), *args, **options)
    eager = value_and_gradient(composed, x, *args, **options)
    sizes = x.detach().double().abs(), weight.double().abs()
    logits = F.linear(*sizes, bias if bias is None else bias.double().abs())
    of_loss, of_logits = magnitudes(logits, target, options)
    assert_close("loss", got[0], exact[0], eager[0], of_loss)
    # A row's own gradient is rounded before it is scaled: eps / 2 more, in assert_close's units.
    eps, eps32 = torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps
    of_x = of_logits @ sizes[1] + exact[1].abs() * eps / (4 * eps32)
    assert_close("dx", got[1], exact[1], eager[1], of_x)
