"""glu by Triton, simulated: values, strides, gradients in place, launches and bytes, reasons."""

from importlib import import_module

import pytest
import torch
from backends import TRITON, simulated
from glu_cases import DTYPES, FUNCTIONS, all_of, assert_as_good_as_eager, eager, inputs
from tolerance import assert_same

from fusetune import ops
from fusetune.ops import _triton
from fusetune.ops._registry import OPS, Case

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def triton_sim():
    with simulated("triton-sim") as run:
        yield run


@pytest.mark.parametrize("backend", TRITON, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_value_and_gradients(backend, activation, dtype):
    for shape in ((1, 1), (2, 3, 63), (9, 520)):
        assert_as_good_as_eager(activation, *inputs(*shape, dtype=dtype))


@pytest.mark.parametrize("backend", TRITON, indirect=True)
def test_strides_and_empty(backend):
    """Halves of one projection, rows that lie apart, and nothing at all."""
    both, dy = torch.randn(4, 3, 80, requires_grad=True), torch.randn(4, 3, 40)
    [got] = torch.autograd.grad(ops.glu(*both.chunk(2, -1), "gelu"), both, dy)
    [expected] = torch.autograd.grad(eager(*both.chunk(2, -1), "gelu"), both, dy)
    assert_same(got, expected)
    for shape in ((0, 5), (4, 0)):
        assert all(t.numel() == 0 for t in all_of(ops.glu, *inputs(*shape)))


@pytest.mark.parametrize("backend", TRITON, indirect=True)
@pytest.mark.parametrize("needed", ["gate", "up"])
def test_one_gradient_alone(backend, needed):
    gate, up, dy = inputs(3, 20)
    wanted = {"gate": gate, "up": up}[needed].requires_grad_()
    [got] = torch.autograd.grad(ops.glu(gate, up), wanted, dy)
    assert_same(got, torch.autograd.grad(eager(gate, up), wanted, dy)[0])


def test_gradients_take_the_inputs_place(triton_sim, monkeypatch):
    """Saved projections that nobody else holds are written over."""
    leaves, dy = inputs(5, 70)[:2], torch.randn(5, 70)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(eager(*leaves, "gelu"), leaves, dy)
    module = import_module("fusetune.ops.glu")
    monkeypatch.setattr(module, "_empty_like", lambda tensor: pytest.fail("not in place"))
    got = torch.autograd.grad(ops.glu(*(leaf * 1 for leaf in leaves), "gelu"), leaves, dy)
    for one, other in zip(got, expected, strict=True):
        assert_same(one, other)
    assert [launch.kernel for launch in triton_sim.launches] == ["_glu", "_glu_backward"]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_launches_and_bytes(triton_sim, dtype):
    """One launch each way, and every matrix once."""
    m, n = 32, 1024
    all_of(ops.glu, *inputs(m, n, dtype=dtype), "gelu_new")
    forward, backward = triton_sim.launches
    assert (forward.kernel, backward.kernel) == ("_glu", "_glu_backward")
    matrix = m * n * dtype.itemsize
    assert 32 * forward.counts.global_load_sectors == 2 * matrix
    assert 32 * forward.counts.global_store_sectors == matrix
    assert 32 * backward.counts.global_load_sectors == 3 * matrix
    assert 32 * backward.counts.global_store_sectors == 2 * matrix


def test_reasons(monkeypatch):
    with simulated("triton-sim"), ops.use_backend("auto"):
        for op in ("glu", "glu_backward"):
            assert OPS[op].select(Case("cpu", BF16)).name == "triton"
            reasons = dict(OPS[op].explain(Case("cpu", torch.float64)))
            assert "float64" in reasons["triton"]
            monkeypatch.setattr(_triton, "capability", lambda device=None: 75)
            assert "sm_75" in dict(OPS[op].explain(Case("cpu", BF16)))["triton"]
            assert dict(OPS[op].explain(Case("cpu", F16)))["triton"] is None
            monkeypatch.undo()
