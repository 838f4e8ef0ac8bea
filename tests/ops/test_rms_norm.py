"""rms_norm against float64, on the reference and on the CPU's kernel."""

import pytest
import torch
from rms_norm_cases import DTYPES, EPS, assert_matches_float64, inputs

from fusetune import ops

SHAPES = ((1, 1), (3, 15), (5, 17), (40, 1000), (2, 3, 33), (300, 576))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(backend, shape, dtype):
    assert_matches_float64(*inputs(*shape, dtype=dtype))


def test_strides(backend):
    assert_matches_float64(torch.randn(7, 40)[:, 3:20], torch.randn(34)[::2], torch.randn(17, 7).T)
    assert_matches_float64(torch.randn(20, 9).T, torch.randn(20), torch.randn(1, 20).expand(9, 20))


@pytest.mark.parametrize("scale", [0.0, 1e-18, 1e15])
def test_extremes(backend, scale):
    assert_matches_float64(torch.randn(4, 24) * scale, torch.randn(24), torch.randn(4, 24))


def test_empty(backend):
    assert ops.rms_norm(torch.empty(0, 5), torch.ones(5), EPS).shape == (0, 5)
    assert ops.rms_norm(torch.empty(3, 0), torch.ones(0), EPS).shape == (3, 0)


def test_frozen_weight_has_no_gradient(backend):
    x = torch.randn(3, 8, requires_grad=True)
    ops.rms_norm(x, torch.ones(8), EPS).sum().backward()
    assert x.grad is not None


def test_whole_output_is_written(backend, monkeypatch):
    from fusetune.ops import _cpu

    def full_of_nan(*shape, dtype):
        return torch.full(shape, torch.nan, dtype=dtype)

    monkeypatch.setattr(_cpu, "empty", full_of_nan)
    assert_matches_float64(torch.randn(9, 35), torch.randn(35), torch.randn(9, 35))


def test_opcheck():
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    torch.library.opcheck(torch.ops.fusetune.rms_norm.default, (x, weight, EPS))


def test_compiles_without_a_graph_break():
    x, weight = torch.randn(3, 5), torch.randn(5)
    function = torch.compile(ops.rms_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(function(x, weight, EPS), ops.rms_norm(x, weight, EPS))


@pytest.mark.parametrize(
    ("x", "weight", "error", "message"),
    [
        (torch.ones(3, 5, dtype=torch.int64), torch.ones(5), TypeError, "x must be float16"),
        (torch.tensor(1.0), torch.ones(5), ValueError, "x must have shape"),
        (torch.ones(3, 5), torch.ones(4), ValueError, "weight must have shape"),
    ],
)
def test_bad_arguments(x, weight, error, message):
    with pytest.raises(error, match=message):
        ops.rms_norm(x, weight, EPS)
