"""dora_linear: what it keeps, the arguments it takes, torch.library."""

import itertools

import pytest
import torch
from dora_cases import NAMES, leaves, make, results
from lora_cases import DTYPES
from tolerance import assert_same
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fusetune import ops
from fusetune.ops._weight import flatten


@pytest.mark.parametrize("trained", [NAMES, ("x", "lora_A", "lora_B")])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_saved(backend, dtype, dropout_p, trained):
    """x by reference, s, the norms, the seed, and z only for a magnitude that is trained."""
    m, n, k, r = 50, 60, 70, 4
    arguments = leaves(make(m, n, k, r, dtype), trained)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.dora_linear(**arguments, dropout_p=dropout_p)
    own = {arguments[name].data_ptr() for name in NAMES}
    others = [t for t in saved if t.numel() and t.data_ptr() not in own]
    expected = [((n,), torch.float32), ((m, r), torch.float32)]
    expected += [((1,), torch.int64)] if dropout_p else []
    expected += [((m, n), dtype)] if "magnitude" in trained else []
    assert sorted((tuple(t.shape), str(t.dtype)) for t in others) == sorted(
        (shape, str(kind)) for shape, kind in expected
    )


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_any_subset_may_require_grad(backend, dropout_p, kind):
    arguments = make(15, 9, 70, 2, kind=kind)
    dy = torch.randn(15, 9)
    torch.manual_seed(2)
    full = results(ops.dora_linear, arguments, dy, dropout_p=dropout_p)
    for size in range(1, len(NAMES) + 1):
        for subset in itertools.combinations(NAMES, size):
            torch.manual_seed(2)
            some = results(ops.dora_linear, arguments, dy, subset, dropout_p=dropout_p)
            for name, value in some.items():
                assert_same(value, full[name], str(subset))
    assert not ops.dora_linear(**arguments).requires_grad


def test_y_may_be_changed_in_place_and_x_may_not(backend):
    arguments = leaves(make(5, 9, 70, 2))
    expected = results(lambda **a: ops.dora_linear(**a).relu(), arguments, torch.ones(5, 9))
    got = results(lambda **a: ops.dora_linear(**a).relu_(), arguments, torch.ones(5, 9))
    for name in expected:
        assert torch.equal(got[name], expected[name])
    y = ops.dora_linear(**arguments)
    with torch.no_grad():
        arguments["x"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_differentiating_twice_is_refused(backend):
    arguments = leaves(make(3, 9, 64, 2))
    y = ops.dora_linear(**arguments).square().sum()
    (dx,) = torch.autograd.grad(y, arguments["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("m", [2, 40])
def test_leading_dimensions_and_strides(backend, m, dropout_p, kind):
    arguments = make(m, 24, 70, 3, kind=kind)
    base = torch.randn(m, 3, 140)
    variants = {
        "vector": base[0, 0, :70],
        "three dimensions": base[..., :70],
        "every second column": base[..., ::2],
        "transposed": torch.randn(70, m).T,
        "expanded": torch.randn(1, 70).expand(m, 70),
    }
    strided = {
        "lora_A": arguments["lora_A"].T.contiguous().T,
        "lora_B": arguments["lora_B"].T.contiguous().T,
        "bias": arguments["bias"].repeat_interleave(2)[::2],
        "magnitude": arguments["magnitude"].repeat_interleave(2)[::2],
    }
    if kind == "dense":
        strided["weight"] = arguments["weight"].T.contiguous().T
    for name, x in variants.items():
        rows = x.contiguous().reshape(-1, 70)
        torch.manual_seed(0)
        dy = torch.ones(len(rows), 24)
        expected = results(ops.dora_linear, arguments | {"x": rows}, dy, dropout_p=dropout_p)
        inputs = leaves(arguments | strided)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        torch.manual_seed(0)
        y = ops.dora_linear(**(inputs | {"x": leaf.expand(x.shape)}), dropout_p=dropout_p)
        assert_same(y.flatten(), expected["y"].flatten(), name)
        y.sum().backward()  # sum's gradient is an expanded scalar
        assert_same(leaf.grad.flatten(), expected["dx"].flatten(), name)
        for other in NAMES[1:]:
            assert_same(inputs[other].grad, expected[f"d{other}"], f"{name} {other}")


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_rows(backend, shape, dropout_p, kind):
    arguments = leaves(make(1, 8, 64, 2, kind=kind) | {"x": torch.randn(shape)})
    y = ops.dora_linear(**arguments, dropout_p=dropout_p)
    assert y.shape == (*shape[:-1], 8)
    y.sum().backward()
    for name in NAMES:
        assert torch.equal(arguments[name].grad, torch.zeros_like(arguments[name])), name


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_a_tensor_as_scaling_is_a_number(backend, kind):
    arguments, dy = make(5, 9, 70, 2, kind=kind), torch.randn(5, 9)
    expected = results(ops.dora_linear, arguments, dy)
    got = results(ops.dora_linear, arguments | {"scaling": torch.tensor(1.5)}, dy)
    for name in expected:
        assert_same(got[name], expected[name], name)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_autocast_changes_nothing_inside(backend, kind):
    arguments, dy = make(20, 9, 70, 2, kind=kind), torch.randn(20, 9)
    expected = results(ops.dora_linear, arguments, dy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(ops.dora_linear, arguments, dy)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_modes_that_watch_ops_see_ours(backend, kind):
    """A mode may replace memory by fakes: then no kernel may be handed an address."""
    arguments = make(3, 9, 70, 2, kind=kind)
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = ops.dora_linear(**arguments, dropout_p=0.5)
    assert isinstance(y, FakeTensor)
    assert y.shape == (3, 9)


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"x": torch.zeros(2, 63)}, ValueError, r"x must have shape \[\.\.\., 64\], got \[2, 63\]"),
        ({"weight": torch.zeros(8, 64, requires_grad=True)}, ValueError, "weight requires grad"),
        ({"lora_A": torch.zeros(3, 64)}, ValueError, r"lora_B must have shape \[8, 3\]"),
        ({"magnitude": torch.zeros(7)}, ValueError, r"magnitude must have shape \(8,\)"),
        ({"magnitude": torch.zeros(8, 1)}, ValueError, r"magnitude must have shape \(8,\)"),
        ({"magnitude": torch.zeros(8, dtype=torch.int64)}, TypeError, "magnitude must be .*int64"),
        ({"magnitude": torch.zeros(8, device="meta")}, ValueError, "magnitude is on meta"),
        ({"magnitude": None}, TypeError, "magnitude must be a tensor, got NoneType"),
        ({"norm": torch.zeros(7)}, ValueError, r"norm must have shape \(8,\)"),
        ({"norm": torch.zeros(8, dtype=torch.int8)}, TypeError, "norm must be .*int8"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias must have shape \(8,\)"),
        ({"scaling": torch.ones(2)}, ValueError, "scaling must be a number or a 0-d tensor"),
        ({"scaling": "1"}, TypeError, "scaling must be a number or a 0-d tensor, got str"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1, got 1.5"),
    ],
)
def test_bad_arguments(arguments, error, names):
    good = make(2, 8, 64, 2, kind="dense")
    with pytest.raises(error, match=names):
        ops.dora_linear(**(good | arguments))


# --- torch.library --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "fp4 nested"])
def test_opcheck(backend, kind):
    a = leaves(make(6, 8, 70, 2, kind=kind))
    norm, seed = torch.rand(8) + 5, torch.tensor([5])
    x, *weight = a["x"], *flatten(a["weight"])
    adapter = (a["lora_A"], a["lora_B"], 1.5, a["magnitude"], norm)
    op = torch.ops.fusetune.dora_linear.default
    options = (a["bias"], 0.3, seed, True)
    torch.library.opcheck(op, (x.view(2, 3, 70), *weight, *adapter, *options), atol=1e-4, rtol=0)
    plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in adapter]
    saved = (torch.randn(6, 2), torch.randn(6, 8), 0.3, seed)
    backward = (torch.randn(6, 8), x.detach(), *weight, *plain, *saved)
    for need in ((True,) * 4, (False, True, False, True)):
        torch.library.opcheck(torch.ops.fusetune.dora_linear_backward.default, (*backward, *need))


@pytest.mark.parametrize("scaling", [1.5, torch.tensor(1.5)])
@pytest.mark.parametrize("kind", ["dense", "fp4 nested"])
def test_compiles_in_one_graph(fresh_compiler, backend, kind, scaling):
    compiled = torch.compile(ops.dora_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (3, 7):
        arguments = make(m, 8, 70, 2, kind=kind) | {"scaling": scaling}
        dy = torch.randn(m, 8)
        torch.manual_seed(3)
        expected = results(ops.dora_linear, arguments, dy, dropout_p=0.3)
        torch.manual_seed(3)
        got = results(compiled, arguments, dy, dropout_p=0.3)
        for name in expected:
            assert_same(got[name], expected[name], name)
