"""swiglu against PyTorch's operators in float64, and its interface."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close
from torch.nn import functional as F

from fusetune import _native
from fusetune.ops import set_isa, swiglu, use_backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = _native.C.available_isas() if _native.C else []
SHAPES = [(1,), (1, 1), (3, 7), (2, 3, 63), (5, 257), (40, 1000), (0, 5), (4, 0), (2, 0, 3)]


def eager(gate, up):
    return F.silu(gate) * up


def all_of(function, gate, up, dy):
    gate, up = (tensor.detach().requires_grad_() for tensor in (gate, up))
    y = function(gate, up)
    return y.detach(), *torch.autograd.grad(y, (gate, up), dy)


def inputs(*shape, dtype=torch.float32, scale=3.0):
    return [(scale * torch.randn(*shape)).to(dtype) for _ in range(3)]


def assert_as_good_as_eager(gate, up, dy):
    got = all_of(swiglu, gate, up, dy)
    exact = all_of(eager, *(tensor.double() for tensor in (gate, up, dy)))
    # dgate's slope s + z s (1 - s) cancels where it crosses zero: rounded by its terms.
    s = gate.double().sigmoid()
    slope = s + gate.double().abs() * s * (1 - s)
    sizes = (exact[0].abs(), (dy.double() * up.double()).abs() * slope, exact[2].abs())
    rounded = all_of(eager, gate, up, dy)
    for name, *tensors in zip(("y", "dgate", "dup"), got, exact, rounded, sizes, strict=True):
        assert_close(name, *tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(backend, dtype, shape):
    assert_as_good_as_eager(*inputs(*shape, dtype=dtype))


@pytest.mark.skipif(_native.C is None, reason="no native module")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    """Sizes that leave a rest in every width of vectors."""
    before = _native.C.isa()
    set_isa(isa)
    try:
        for n in (1, 3, 15, 17, 31, 33, 100):
            with use_backend("cpu"):
                assert_as_good_as_eager(*inputs(5, n, dtype=dtype))
    finally:
        set_isa(before)


@settings(max_examples=40, deadline=None)
@given(m=st.integers(0, 9), n=st.integers(0, 300), scale=st.floats(0, 30))
def test_any_shape_and_scale(m, n, scale):
    torch.manual_seed(m + n)
    assert_as_good_as_eager(*inputs(m, n, scale=scale))


def test_gradcheck_in_float64():
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))


def test_extreme_gates(backend):
    gate = torch.tensor([-torch.inf, -1e30, -100.0, -0.0, 100.0, 1e30, torch.inf, torch.nan])
    up, dy = torch.linspace(1, 2, 8), torch.ones(8)
    got, expected = all_of(swiglu, gate, up, dy), all_of(eager, gate, up, dy)
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_halves_of_one_projection(backend):
    """As phi's: rows that lie apart, and a gradient for both halves of one tensor."""
    both, dy = torch.randn(4, 3, 80, requires_grad=True), torch.randn(4, 3, 40)
    [got] = torch.autograd.grad(swiglu(*both.chunk(2, -1)), both, dy)
    [expected] = torch.autograd.grad(eager(*both.chunk(2, -1)), both, dy)
    torch.testing.assert_close(got, expected)


def test_transposed_and_expanded(backend):
    gate, up = torch.randn(6, 9).T, torch.randn(6).expand(9, 6)
    torch.testing.assert_close(
        all_of(swiglu, gate, up, torch.ones(()).expand(9, 6)),
        all_of(eager, gate, up, torch.ones(9, 6)),
    )


@pytest.mark.parametrize("needed", ["gate", "up"])
def test_one_gradient_alone(backend, needed):
    gate, up, dy = inputs(3, 20)
    wanted = {"gate": gate, "up": up}[needed].requires_grad_()
    got = torch.autograd.grad(swiglu(gate, up), wanted, dy)
    torch.testing.assert_close(got, torch.autograd.grad(eager(gate, up), wanted, dy))


def test_only_gate_and_up_are_kept(backend):
    gate, up, _ = (tensor.requires_grad_() for tensor in inputs(8, 50))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(gate, up)
    assert {tensor.data_ptr() for tensor in kept} == {gate.data_ptr(), up.data_ptr()}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_opcheck(dtype):
    gate, up, dy = inputs(4, 30, dtype=dtype)
    torch.library.opcheck(
        torch.ops.fusetune.swiglu.default, (gate.requires_grad_(), up.requires_grad_())
    )
    arguments = (dy, gate.detach(), up.detach())
    torch.library.opcheck(torch.ops.fusetune.swiglu_backward.default, arguments)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_equals_eager():
    compiled = torch.compile(swiglu, backend="aot_eager", fullgraph=True)
    for shape in ((4, 30), (3, 30)):
        given = inputs(*shape)
        torch.testing.assert_close(all_of(compiled, *given), all_of(swiglu, *given))


@pytest.mark.parametrize(
    ("gate", "up", "error", "message"),
    [
        (torch.ones(3, dtype=torch.int64), torch.ones(3), TypeError, "gate must be float16"),
        (torch.ones(3), [1.0], TypeError, "up must be a tensor"),
        (torch.ones(()), torch.ones(()), ValueError, r"gate must have shape \[..., N\], got \[\]"),
        (torch.ones(3, 4), torch.ones(4), ValueError, r"up must have shape \(3, 4\), got \(4,\)"),
        (torch.ones(3), torch.ones(3).half(), TypeError, "up is torch.float16, gate torch.float32"),
        (torch.ones(3), torch.ones(3, device="meta"), ValueError, "up is on meta, gate on cpu"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_arguments(gate, up, error, message):
    with pytest.raises(error, match=message):
        swiglu(gate, up)
