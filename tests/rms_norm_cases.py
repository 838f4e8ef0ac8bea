"""Inputs of rms_norm, what it is compared with, and when they agree: for its tests."""

import torch
from tolerance import assert_close, one_thread

from fusetune import ops
from fusetune.bench.rms_norm_cases import EPS
from fusetune.bench.rms_norm_cases import expression as eager

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def inputs(*shape, dtype=torch.float32):
    return [torch.randn(s).to(dtype) for s in (shape, shape[-1:], shape)]


def all_of(function, x, weight, dy):
    x, weight = (t.detach().clone().requires_grad_() for t in (x, weight))
    y = function(x, weight, EPS)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    return {"y": y.detach(), "dx": dx, "dw": dw}


def assert_matches_float64(x, weight, dy):
    got = all_of(ops.rms_norm, x, weight, dy)
    with one_thread(), ops.use_backend("reference"):
        exact = all_of(ops.rms_norm, x.double(), weight.double(), dy.double())
        plain = all_of(eager, x, weight, dy)
    magnitude = magnitudes(x.double(), weight.double(), dy.double())
    for name, value in got.items():
        assert_close(name, value, exact[name], plain[name], magnitude[name])


def magnitudes(x, weight, dy):
    """The sums over absolute values, which is what rounding errors scale with."""
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    upper = (dy * weight).abs()
    along = (upper * x.abs()).mean(-1, keepdim=True)
    dw = (dy * x * rstd).abs().reshape(-1, x.shape[-1]).sum(0)
    return {
        "y": (weight * x * rstd).abs(),
        "dx": rstd * (upper + x.abs() * rstd.square() * along),
        "dw": dw,
    }
