"""cross_entropy against torch's in float64, and what it may cost."""

import pytest
import torch
from cross_entropy_cases import DTYPES, assert_as_good_as_eager, inputs, value_and_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fusetune import _native
from fusetune.ops import cross_entropy, set_isa, use_backend

ISAS = _native.C.available_isas() if _native.C else []
SHAPES = [(1, 1), (1, 2), (3, 7), (5, 63), (2, 1000), (33, 257), (300, 64), (4, 49152)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_value_and_gradient(backend, dtype, shape, smoothing):
    assert_as_good_as_eager(*inputs(*shape, dtype), smoothing)


@pytest.mark.skipif(_native.C is None, reason="no native module")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    """Sizes that leave a rest in every width of vectors, and more than one block of a sum."""
    before = _native.C.isa()
    set_isa(isa)
    try:
        for v in (1, 3, 15, 17, 1023, 2500):
            logits, target = inputs(5, v, dtype)
            with use_backend("cpu"):
                got = value_and_gradient(cross_entropy, logits, target, label_smoothing=0.1)
            with use_backend("reference"):
                true = value_and_gradient(cross_entropy, logits, target, label_smoothing=0.1)
            torch.testing.assert_close(got, true)
    finally:
        set_isa(before)


def test_mean_is_over_rows_that_count(backend):
    logits, target = inputs(7, 50)
    got = value_and_gradient(cross_entropy, logits, target)
    torch.testing.assert_close(got, value_and_gradient(F.cross_entropy, logits, target))


def test_gradcheck_in_float64():
    logits, target = inputs(4, 9, torch.float64)
    for options in ({}, {"label_smoothing": 0.2, "reduction": "sum"}):
        assert torch.autograd.gradcheck(lambda x, o=options: cross_entropy(x, target, **o), logits)


@settings(max_examples=40, deadline=None)
@given(m=st.integers(0, 9), v=st.integers(1, 300), scale=st.floats(0, 80))
def test_any_shape_and_scale(m, v, scale):
    torch.manual_seed(m + v)
    logits, target = inputs(m, v, scale=scale)
    got = value_and_gradient(cross_entropy, logits, target, reduction="sum")
    exact = value_and_gradient(
        F.cross_entropy, logits.detach().double().requires_grad_(), target, reduction="sum"
    )
    torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got[1].double(), exact[1], rtol=1e-5, atol=1e-5)


def test_extreme_logits(backend):
    """A masked token (-inf), a certain one, values that overflow exp."""
    logits = torch.tensor(
        [[0.0, -torch.inf, 3.0], [1e4, 0.0, -1e4], [88.0, 89.0, 90.0], [-1e30, 0.0, 0.0]]
    )
    target = torch.tensor([2, 0, 1, 1])
    got = value_and_gradient(
        cross_entropy, logits.clone().requires_grad_(), target, reduction="none"
    )
    exact = value_and_gradient(
        F.cross_entropy, logits.clone().requires_grad_(), target, reduction="none"
    )
    torch.testing.assert_close(got, exact)
    assert got[1][0, 1] == 0


def test_nan_spreads_over_its_row_only(backend):
    logits, target = inputs(5, 70, ignored=False)
    with torch.no_grad():
        logits[2, 40] = torch.nan
    loss, gradient = value_and_gradient(cross_entropy, logits, target, reduction="none")
    assert loss.isnan().tolist() == [False, False, True, False, False]
    assert gradient.isnan().all(1).tolist() == [False, False, True, False, False]
    target[2] = -100
    loss, gradient = value_and_gradient(cross_entropy, logits, target, reduction="none")
    assert not loss.isnan().any()
    assert not gradient.isnan().any()


def test_strided_logits(backend):
    logits, target = inputs(6, 40)
    expected = value_and_gradient(cross_entropy, logits, target, reduction="sum")
    transposed = logits.detach().T.contiguous().T.requires_grad_()
    wide = torch.cat([logits.detach(), logits.detach()], 1)[:, :40].requires_grad_()
    for view in (transposed, wide):
        got = value_and_gradient(cross_entropy, view, target, reduction="sum")
        torch.testing.assert_close(got, expected)


def test_the_backward_pass_keeps_no_copy_of_the_logits(backend):
    logits, target = inputs(64, 1000)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        cross_entropy(logits, target)
    large = [tensor for tensor in kept if tensor.numel() >= logits.numel()]
    assert [tensor.data_ptr() for tensor in large] == [logits.data_ptr()]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_opcheck(dtype):
    logits, target = inputs(5, 30, dtype)
    arguments = (logits, target, -100, 0.1)
    torch.library.opcheck(torch.ops.fusetune.cross_entropy.default, arguments)
    loss, lse = torch.ops.fusetune.cross_entropy(*arguments)
    arguments = (loss.detach(), logits.detach(), target, lse, -100, 0.1)
    torch.library.opcheck(torch.ops.fusetune.cross_entropy_backward.default, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.randn(2, 3, 4)}, ValueError, r"logits must have shape \[M, V\]"),
        ({"logits": torch.randn(4, 0)}, ValueError, "V > 0"),
        ({"logits": torch.ones(4, 5, dtype=torch.int64)}, TypeError, "logits must be float16"),
        ({"target": torch.randn(4)}, TypeError, "target must be an int64 tensor"),
        (
            {"target": torch.tensor([1, 2])},
            ValueError,
            r"target must have shape \(4,\), got \(2,\)",
        ),
        (
            {"target": torch.tensor([0, 5, 1, 1])},
            ValueError,
            r"target\[1\] is 5, neither in \[0, 5\)",
        ),
        ({"target": torch.tensor([0, 1, 1, -1])}, ValueError, r"target\[3\] is -1"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be in"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_arguments(backend, change, error, message):
    arguments = {"logits": torch.randn(4, 5), "target": torch.tensor([0, 1, 2, 3]), **change}
    with pytest.raises(error, match=message):
        cross_entropy(**arguments)
