"""linear_cross_entropy against torch's in float64, in blocks and whole, and what it keeps."""

from importlib import import_module

import pytest
import torch
from cross_entropy_cases import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cross_entropy_cases import (
    assert_as_good_as_eager,
    composed,
    inputs,
    value_and_gradient,
)

from fusetune.ops import linear_cross_entropy

SHAPES = [(1, 1, 1), (3, 7, 2), (9, 63, 65), (33, 64, 257), (2, 5, 5000)]
module = import_module("fusetune.ops.linear_cross_entropy")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks, the last one short."""
    monkeypatch.setattr(module, "_CPU_ROWS", 4)
    monkeypatch.setattr(module, "_GPU_ROWS", 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_value_and_gradient(backend, dtype, shape, bias, smoothing):
    given = inputs(*shape, dtype, bias)
    for reduction in ("sum", "none"):
        assert_as_good_as_eager(*given, reduction=reduction, label_smoothing=smoothing)


def test_mean_is_over_rows_that_count(backend):
    given = inputs(9, 20, 50)
    got = value_and_gradient(linear_cross_entropy, *given)
    torch.testing.assert_close(got, value_and_gradient(composed, *given))
    given[2].fill_(-100)
    assert linear_cross_entropy(*given).isnan()


def test_another_index_is_ignored(backend):
    x, weight, target, _ = inputs(9, 20, 50, ignored=False)
    target[4] = target[8] = 7
    got = value_and_gradient(linear_cross_entropy, x, weight, target, ignore_index=7)
    expected = value_and_gradient(composed, x, weight, target, None, ignore_index=7)
    torch.testing.assert_close(got, expected)
    assert not got[1][4].any()


def test_without_gradient(backend):
    x, weight, target, bias = inputs(9, 20, 50, bias=True)
    expected = composed(x, weight, target, bias)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, weight, target, bias), expected)
    loss = linear_cross_entropy(x.detach(), weight, target, bias)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)


@settings(max_examples=30, deadline=None)
@given(m=st.integers(0, 13), k=st.integers(1, 70), v=st.integers(1, 200))
def test_any_shape(m, k, v):
    torch.manual_seed(m + v)
    given = inputs(m, k, v)
    got = value_and_gradient(linear_cross_entropy, *given, reduction="sum")
    expected = value_and_gradient(composed, *given, reduction="sum")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_gradcheck_in_float64():
    x, weight, target, bias = inputs(6, 4, 9, torch.float64, True)
    for options in ({}, {"label_smoothing": 0.2, "reduction": "none"}):
        assert torch.autograd.gradcheck(
            lambda x, o=options: linear_cross_entropy(x, weight, target, bias, **o), x
        )


def test_strided_inputs(backend):
    x, weight, target, _ = inputs(9, 20, 50)
    expected = value_and_gradient(linear_cross_entropy, x, weight, target)
    wide = torch.cat([x.detach()] * 2, 1)[:, :20].requires_grad_()
    turned = weight.T.contiguous().T
    torch.testing.assert_close(
        value_and_gradient(linear_cross_entropy, wide, turned, target), expected
    )


def test_a_graph_that_is_kept_gives_its_gradient_again(backend):
    x, weight, target, _ = inputs(9, 20, 50)
    loss = linear_cross_entropy(x, weight, target)
    [first] = torch.autograd.grad(loss, x, retain_graph=True)
    first = first.clone()
    [again] = torch.autograd.grad(loss * 2, x)
    torch.testing.assert_close(again, 2 * first)


def test_nothing_of_the_logits_is_kept(backend):
    x, weight, target, _ = inputs(40, 10, 1000)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = linear_cross_entropy(x, weight, target)
        [got] = torch.autograd.grad(loss, x)
    assert max(tensor.numel() for tensor in kept) == x.numel()
    torch.testing.assert_close(got, torch.autograd.grad(composed(x, weight, target, None), x)[0])


def test_rows_that_are_ignored_cost_nothing(monkeypatch):
    """On CPUs: only the others are multiplied."""
    seen = []
    run = module.LINEAR.run

    def counted(*case):
        product = run(*case)
        return lambda rows, *args: seen.append(len(rows)) or product(rows, *args)

    monkeypatch.setattr(module.LINEAR, "run", counted)
    x, weight, target, _ = inputs(20, 10, 30, ignored=False)
    target[5:] = -100
    expected = value_and_gradient(composed, x, weight, target, None)
    torch.testing.assert_close(
        value_and_gradient(linear_cross_entropy, x, weight, target), expected
    )
    if module.OP.carrier("cpu", x.dtype, x.dtype) == "cpu":
        assert seen == [4, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    x, weight, target, bias = inputs(5, 8, 30, dtype, True)
    arguments = (x, weight, bias, target, -100, 0.1, True)
    torch.library.opcheck(torch.ops.fusetune.linear_cross_entropy.default, arguments)


def test_compiled():
    given = inputs(9, 20, 50, bias=True)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    got = value_and_gradient(compiled, *given)
    torch.testing.assert_close(got, value_and_gradient(composed, *given))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(2, 4, 5)}, ValueError, r"x must be a matrix \[M, 5\]"),
        ({"x": torch.randn(4, 6)}, ValueError, r"x must have shape \[..., 5\]"),
        ({"x": torch.ones(4, 5, dtype=torch.int64)}, TypeError, "x must be float16"),
        ({"x": torch.randn(4, 5).double()}, TypeError, "weight is torch.float32, x torch.float64"),
        ({"weight": torch.randn(0, 5)}, ValueError, "V > 0"),
        ({"weight": torch.randn(3)}, ValueError, r"weight must be a matrix \[V, K\]"),
        ({"weight": torch.randn(9, 5, requires_grad=True)}, ValueError, "weight requires grad"),
        ({"bias": torch.randn(8)}, ValueError, r"bias must have shape \(9,\)"),
        ({"bias": torch.randn(9, requires_grad=True)}, ValueError, "bias requires grad"),
        ({"target": torch.randn(4)}, TypeError, "target must be an int64 tensor"),
        ({"target": torch.tensor([1, 2])}, ValueError, r"target must have shape \(4,\)"),
        ({"target": torch.tensor([0, -100, 9, 1])}, ValueError, r"target\[2\] is 9, neither"),
        ({"target": torch.tensor([0, 1, 1, -1])}, ValueError, r"target\[3\] is -1"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be in"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_arguments(backend, change, error, message):
    arguments = {
        "x": torch.randn(4, 5),
        "weight": torch.randn(9, 5),
        "target": torch.tensor([0, 1, 2, 3]),
        **change,
    }
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments)
