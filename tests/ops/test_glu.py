"""glu against PyTorch's operators in float64, and its interface."""

import pytest
import torch
from glu_cases import DTYPES, FUNCTIONS, all_of, assert_as_good_as_eager, eager, inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from fusetune import _native
from fusetune.ops import glu, set_isa, use_backend

ISAS = _native.C.available_isas() if _native.C else []
SHAPES = [(1,), (1, 1), (3, 7), (2, 3, 63), (5, 257), (40, 1000), (0, 5), (4, 0), (2, 0, 3)]


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(backend, dtype, shape, activation):
    assert_as_good_as_eager(activation, *inputs(*shape, dtype=dtype))


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
                for activation in FUNCTIONS:
                    assert_as_good_as_eager(activation, *inputs(5, n, dtype=dtype))
    finally:
        set_isa(before)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(0, 9),
    n=st.integers(0, 300),
    scale=st.floats(0, 30),
    activation=st.sampled_from(FUNCTIONS),
)
def test_any_shape_and_scale(m, n, scale, activation):
    torch.manual_seed(m + n)
    assert_as_good_as_eager(activation, *inputs(m, n, scale=scale))


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_gradcheck_in_float64(activation):
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(glu, (gate, up, activation))


def test_the_activation_by_default_is_silu():
    gate, up, _ = inputs(3, 5)
    assert torch.equal(glu(gate, up), glu(gate, up, "silu"))


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_extreme_gates(backend, activation):
    """At infinity torch's GELU is NaN, ours the limit."""
    last = torch.inf if activation == "silu" else 1e9
    gate = torch.tensor([-torch.inf, -1e30, -100.0, -0.0, 100.0, 1e30, last, torch.nan])
    up, dy = torch.linspace(1, 2, 8), torch.ones(8)
    got = all_of(glu, gate, up, dy, activation)
    expected = all_of(eager, gate, up, dy, activation)
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_halves_of_one_projection(backend):
    """As phi's: rows that lie apart, and a gradient for both halves of one tensor."""
    both, dy = torch.randn(4, 3, 80, requires_grad=True), torch.randn(4, 3, 40)
    [got] = torch.autograd.grad(glu(*both.chunk(2, -1)), both, dy)
    [expected] = torch.autograd.grad(eager(*both.chunk(2, -1)), both, dy)
    torch.testing.assert_close(got, expected)


def test_transposed_and_expanded(backend):
    gate, up = torch.randn(6, 9).T, torch.randn(6).expand(9, 6)
    torch.testing.assert_close(
        all_of(glu, gate, up, torch.ones(()).expand(9, 6)),
        all_of(eager, gate, up, torch.ones(9, 6)),
    )


@pytest.mark.parametrize("needed", ["gate", "up"])
def test_one_gradient_alone(backend, needed):
    gate, up, dy = inputs(3, 20)
    wanted = {"gate": gate, "up": up}[needed].requires_grad_()
    got = torch.autograd.grad(glu(gate, up), wanted, dy)
    torch.testing.assert_close(got, torch.autograd.grad(eager(gate, up), wanted, dy))


def test_only_gate_and_up_are_kept(backend):
    gate, up, _ = (tensor.requires_grad_() for tensor in inputs(8, 50))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        glu(gate, up)
    assert {tensor.data_ptr() for tensor in kept} == {gate.data_ptr(), up.data_ptr()}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_opcheck(dtype):
    gate, up, dy = inputs(4, 30, dtype=dtype)
    arguments = (gate.requires_grad_(), up.requires_grad_(), "gelu")
    torch.library.opcheck(torch.ops.fusetune.glu.default, arguments)
    arguments = (dy, gate.detach(), up.detach(), "gelu")
    torch.library.opcheck(torch.ops.fusetune.glu_backward.default, arguments)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_equals_eager():
    compiled = torch.compile(glu, backend="aot_eager", fullgraph=True)
    for shape in ((4, 30), (3, 30)):
        given = inputs(*shape)
        torch.testing.assert_close(all_of(compiled, *given), all_of(glu, *given))


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
        glu(gate, up)


def test_another_activation_is_refused():
    with pytest.raises(
        ValueError, match=r"activation must be one of \('silu', 'gelu', 'gelu_new'\)"
    ):
        glu(torch.ones(3), torch.ones(3), "relu")
