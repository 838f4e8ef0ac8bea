"""rms_norm by Triton, simulated: values, long rows, strides, launches and bytes, reasons."""

import pytest
import torch
from backends import TRITON, simulated
from rms_norm_cases import DTYPES, EPS, all_of, assert_matches_float64, eager, inputs

from fusetune import ops
from fusetune.ops import _triton
from fusetune.ops._registry import OPS, Case

BF16 = torch.bfloat16


@pytest.mark.parametrize("backend", TRITON, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradients(backend, dtype):
    for shape in ((1, 1), (2, 3, 63), (5, 576), (40, 17)):
        assert_matches_float64(*inputs(*shape, dtype=dtype))


@pytest.mark.parametrize("backend", TRITON, indirect=True)
def test_rows_that_go_in_parts(backend):
    """One element over a part, within one, and whole parts."""
    for n in (8193, 9000, 16384):
        assert_matches_float64(*inputs(2, n))


@pytest.mark.parametrize("backend", TRITON, indirect=True)
def test_strides_and_empty(backend):
    x, weight, dy = torch.randn(7, 40)[:, 3:20], torch.randn(34)[::2], torch.randn(17, 7).T
    assert_matches_float64(x, weight, dy)
    assert_matches_float64(torch.randn(20, 9).T, torch.randn(20), torch.randn(1, 20).expand(9, 20))
    for shape in ((0, 5), (3, 0)):
        assert all(
            t.numel() in (0, shape[-1]) for t in all_of(ops.rms_norm, *inputs(*shape)).values()
        )


@pytest.mark.parametrize("backend", TRITON, indirect=True)
def test_weight_of_another_dtype(backend):
    """A norm that was kept in fp32 for activations in 16 bits: rounded once, to x's dtype."""
    x, weight, _ = inputs(5, 40)
    y = ops.rms_norm(x.to(BF16), weight, EPS)
    exact = eager(x.to(BF16).double(), weight.double(), EPS)
    assert y.dtype == BF16
    assert ((y.double() - exact).abs() <= (2**-8 + 2**-20) * exact.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_launches_and_bytes(dtype):
    """One launch each way, every matrix once."""
    m, n = 32, 1024
    with simulated("triton-sim") as run:
        x, weight, dy = inputs(m, n, dtype=dtype)
        y = ops.rms_norm(x.requires_grad_(), weight, EPS)
        torch.autograd.grad(y, x, dy)
    forward, backward = run.launches
    assert (forward.kernel, backward.kernel) == ("_rms_norm", "_rms_norm_dx")
    matrix, programs = m * n * dtype.itemsize, m * n // 2048
    weights = programs * n * dtype.itemsize
    assert 32 * forward.counts.global_load_sectors == matrix + weights
    # rstd by each of the four warps that have a part of its row
    assert 32 * backward.counts.global_load_sectors <= 2 * matrix + weights + 4 * 32 * m
    for launch in (forward, backward):
        assert matrix <= 32 * launch.counts.global_store_sectors <= matrix + 32 * m


def test_reasons(monkeypatch):
    with simulated("triton-sim"), ops.use_backend("auto"):
        for op in ("rms_norm", "rms_norm_dx"):
            assert OPS[op].select(Case("cpu", BF16)).name == "triton"
            reasons = dict(OPS[op].explain(Case("cpu", torch.float64)))
            assert "float64" in reasons["triton"]
            monkeypatch.setattr(_triton, "capability", lambda device=None: 75)
            assert "sm_75" in dict(OPS[op].explain(Case("cpu", BF16)))["triton"]
            monkeypatch.undo()
