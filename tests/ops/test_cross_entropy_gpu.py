"""cross_entropy by Triton, simulated: values, extremes, in place, launches and bytes, reasons."""

from importlib import import_module

import pytest
import torch
from backends import TRITON, simulated
from cross_entropy_cases import DTYPES, assert_as_good_as_eager, inputs, value_and_gradient
from torch.nn import functional as F

from fusetune import ops
from fusetune.ops import cross_entropy
from fusetune.ops._registry import OPS, Case

BF16 = torch.bfloat16


@pytest.mark.parametrize("backend", TRITON, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_value_and_gradient(backend, dtype, smoothing):
    for shape in ((1, 1), (5, 63), (4, 4096), (3, 9001)):
        assert_as_good_as_eager(*inputs(*shape, dtype), smoothing)


@pytest.mark.parametrize("backend", TRITON, indirect=True)
def test_extreme_logits(backend):
    """A masked token (-inf), a whole part of them, a certain one, values that overflow exp."""
    logits = torch.zeros(5, 5000)
    logits[0, 1], logits[1, 0], logits[1, 2], logits[3, 0] = -torch.inf, 1e4, -1e4, -1e30
    logits[2] = torch.linspace(88, 90, 5000)
    logits[4, :4096] = -torch.inf
    target = torch.tensor([2, 0, 1, 1, 4999])
    given = [logits.clone().requires_grad_() for _ in range(2)]
    got = value_and_gradient(cross_entropy, given[0], target, reduction="none")
    exact = value_and_gradient(F.cross_entropy, given[1], target, reduction="none")
    torch.testing.assert_close(got, exact)
    assert got[1][0, 1] == 0


@pytest.mark.parametrize("backend", TRITON, indirect=True)
def test_ignored_rows_and_nan(backend):
    """NaN stays in its row, a row that is ignored is zero whatever it holds; none at all."""
    logits, target = inputs(5, 70, ignored=False)
    with torch.no_grad():
        logits[2, 40] = torch.nan
    _, gradient = value_and_gradient(cross_entropy, logits, target, reduction="none")
    assert gradient.isnan().all(1).tolist() == [False, False, True, False, False]
    target[2] = -100
    loss, gradient = value_and_gradient(cross_entropy, logits, target, reduction="none")
    assert not loss.isnan().any()
    assert not gradient.isnan().any()
    assert not gradient[2].any()
    assert cross_entropy(logits[:0], target[:0], reduction="sum") == 0


@pytest.mark.parametrize("backend", TRITON, indirect=True)
def test_a_target_that_is_no_class(backend):
    """NaN: a kernel cannot raise."""
    logits, _ = inputs(2, 7)
    loss = cross_entropy(logits, torch.tensor([7, 3]), reduction="none")
    assert loss.isnan().tolist() == [True, False]


def test_the_gradient_takes_the_logits_place(monkeypatch):
    logits, target = inputs(5, 90)
    expected = value_and_gradient(F.cross_entropy, logits, target)[1]
    with simulated("triton-sim") as run:
        module = import_module("fusetune.ops.cross_entropy")
        seen, backward = [], module._backward
        monkeypatch.setattr(module, "_backward", lambda *a: seen.append(a[-1]) or backward(*a))
        got = value_and_gradient(lambda x, t: cross_entropy(x * 1, t), logits, target)[1]
    assert seen == [True]
    torch.testing.assert_close(got, expected)
    kernels = ["_cross_entropy", "_cross_entropy_backward"]
    assert [launch.kernel for launch in run.launches] == kernels


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_launches_and_bytes(dtype):
    """One launch each way, each logit once; of ignored rows nothing backward.

    Every warp reads the target, and its logit or lse and dloss, for itself.
    """
    m, v, warps = 4, 8192, 8
    logits, target = inputs(m, v, dtype, ignored=False)
    target[1] = -100
    with simulated("triton-sim") as run:
        value_and_gradient(cross_entropy, logits, target)
    forward, backward = run.launches
    row, parts = v * dtype.itemsize, v // 4096
    assert 32 * forward.counts.global_load_sectors == m * row + 32 * warps * (m + m - 1)
    loads = 32 * backward.counts.global_load_sectors
    assert loads == (m - 1) * row + 32 * m * parts * warps * 3
    assert 32 * backward.counts.global_store_sectors == m * row


def test_reasons():
    with simulated("triton-sim"), ops.use_backend("auto"):
        for op in ("cross_entropy", "cross_entropy_backward"):
            assert OPS[op].select(Case("cpu", BF16)).name == "triton"
            reasons = dict(OPS[op].explain(Case("cpu", torch.float64)))
            assert "float64" in reasons["triton"]
