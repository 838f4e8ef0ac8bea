"""Inputs of cross_entropy, torch's, and when they agree: for its tests."""

import torch
from tolerance import assert_close
from torch.nn import functional as F

from fusetune.ops import cross_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(m, v, dtype=torch.float32, scale=4.0, ignored=True):
    logits = (torch.randn(m, v) * scale).to(dtype).requires_grad_()
    target = torch.randint(0, v, (m,))
    if ignored and m > 1:
        target[::3] = -100
    return logits, target


def value_and_gradient(loss, logits, target, **options):
    value = loss(logits, target, **options)
    return value.detach(), torch.autograd.grad(value, logits, torch.ones_like(value) * 1.5)[0]


def magnitudes(logits, target, options):
    """What roundings in fp32 scale with: the logits, the log-sum-exp, and their difference."""
    x = logits.detach().double()
    lse = x.logsumexp(1, keepdim=True)
    loss = lse.abs().squeeze(1) + x.abs().amax(1)
    gradient = (x - lse).exp() * (1 + (x - lse).abs() + lse.abs()) + 1.0 * (
        torch.arange(x.shape[1]) == target[:, None]
    )
    return loss.sum() if options["reduction"] == "sum" else loss, 1.5 * gradient


def eager_cross_entropy(logits, target, **options):
    """As transformers does: upcast to fp32, so that the gradient is rounded back."""
    return F.cross_entropy(logits.float(), target, **options)


def assert_as_good_as_eager(logits, target, smoothing):
    in_float64 = logits.detach().double().requires_grad_()
    for reduction in ("sum", "none"):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        got = value_and_gradient(cross_entropy, logits, target, **options)
        exact = value_and_gradient(F.cross_entropy, in_float64, target, **options)
        eager = value_and_gradient(eager_cross_entropy, logits, target, **options)
        sizes = magnitudes(logits, target, options)
        assert_close("loss", got[0], exact[0], eager[0], sizes[0])
        assert_close("dlogits", got[1], exact[1], eager[1], sizes[1])
