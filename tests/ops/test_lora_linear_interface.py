"""lora_linear: what it keeps and computes, the arguments it takes, torch.library."""

import itertools

import pytest
import torch
from lora_cases import DTYPES, NAMES, absolute, leaves, make, results, to_float64
from tolerance import assert_close, assert_same
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fusetune import _native, ops
from fusetune.ops._weight import flatten

# --- what is kept and what is computed ------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_x_s_and_the_seed_are_saved(backend, dtype):
    m, n, k, r = 50, 60, 70, 4
    arguments = leaves(make(m, n, k, r, dtype))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.lora_linear(**arguments, dropout_p=0.3)
    own = {arguments[name].data_ptr() for name in ("x", "lora_A", "lora_B")}
    others = [t for t in saved if t.data_ptr() not in own]
    assert sorted((tuple(t.shape), t.dtype) for t in others) == [
        ((1,), torch.int64),
        ((m, r), torch.float32),
    ]
    assert sum(t.data_ptr() == arguments["x"].data_ptr() for t in saved) == 1


def allocated(function):
    """The result of a function, and the bytes of every allocation of torch's that it made."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = function()
    events = profile.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return result, [size for size in sizes if size > 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cpu_backend_allocates_its_results_and_nothing_else(dtype):
    """No fp32 copy of x, no mask, no dropped x, no dense weight."""
    m, n, k, r = 64, 96, 128, 8
    arguments = leaves(make(m, n, k, r, dtype))
    del arguments["lora_bias"], arguments["bias"]
    with ops.use_backend("cpu"):
        ops.lora_linear(**arguments)  # what is made once
        y, sizes = allocated(lambda: ops.lora_linear(**arguments, dropout_p=0.3))
        seed, s, size = 8, m * r * 4, dtype.itemsize
        assert sorted(sizes) == sorted([seed, s, m * n * size])
        dy = torch.ones_like(y)
        _, sizes = allocated(lambda: y.backward(dy))
        ds, dA, dB = m * r * 4, r * k * 4, n * r * 4
        assert sorted(sizes) == sorted([ds, dA, dB, m * k * size])


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("m", [5, 50])
def test_any_subset_may_require_grad(backend, m, kind):
    arguments = make(m, 9, 70, 2, kind=kind)
    dy = torch.randn(m, 9)
    torch.manual_seed(2)
    full = results(ops.lora_linear, arguments, dy, dropout_p=0.3)
    for size in range(len(NAMES) + 1):
        for subset in itertools.combinations(NAMES, size):
            some = {
                name: value.clone().requires_grad_() if name in subset else value
                for name, value in arguments.items()
            }
            torch.manual_seed(2)
            y = ops.lora_linear(**some, dropout_p=0.3)
            assert y.requires_grad == bool(subset)
            if subset:
                y.backward(dy)
            for name in subset:
                assert_same(some[name].grad, full[f"d{name}"], str(subset))


def test_x_changed_in_place_is_noticed():
    arguments = leaves(make(5, 9, 70, 2))
    y = ops.lora_linear(**arguments)
    with torch.no_grad():
        arguments["x"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_differentiating_twice_is_refused(backend):
    arguments = leaves(make(3, 9, 64, 2))
    y = ops.lora_linear(**arguments).square().sum()
    (dx,) = torch.autograd.grad(y, arguments["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("m", [2, 40])
def test_leading_dimensions_and_strides(backend, m, kind):
    arguments = make(m, 24, 70, 3, kind=kind)
    base = torch.randn(m, 3, 140)
    variants = {
        "vector": base[0, 0, :70],
        "three dimensions": base[..., :70],
        "every second column": base[..., ::2],
        "transposed": torch.randn(70, m).T,
        "expanded": torch.randn(1, 70).expand(m, 70),
        "four dimensions": torch.randn(2, m, 1, 70),
        "overlapping": torch.randn(m + 69).as_strided((m, 70), (1, 1)),
    }
    transposed = {
        "lora_A": arguments["lora_A"].T.contiguous().T,
        "lora_B": arguments["lora_B"].T.contiguous().T,
        "bias": arguments["bias"].repeat_interleave(2)[::2],
    }
    if kind == "dense":
        transposed["weight"] = arguments["weight"].T.contiguous().T
    for name, x in variants.items():
        rows = x.contiguous().reshape(-1, 70)
        torch.manual_seed(0)
        expected = results(ops.lora_linear, arguments | {"x": rows}, torch.ones(len(rows), 24))
        inputs = leaves(arguments | transposed)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = ops.lora_linear(**(inputs | {"x": leaf.expand(x.shape)}))
        assert_same(y.flatten(), expected["y"].flatten(), name)
        y.sum().backward()  # sum's gradient is an expanded scalar
        assert_same(leaf.grad.flatten(), expected["dx"].flatten(), name)
        assert_same(inputs["lora_A"].grad, expected["dlora_A"], name)
        assert_same(inputs["lora_B"].grad, expected["dlora_B"], name)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_rows(backend, shape, kind):
    arguments = leaves(make(1, 8, 64, 2, kind=kind) | {"x": torch.randn(shape)})
    y = ops.lora_linear(**arguments, dropout_p=0.5)
    assert y.shape == (*shape[:-1], 8)
    y.sum().backward()
    for name in NAMES:
        assert torch.equal(arguments[name].grad, torch.zeros_like(arguments[name])), name


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_a_tensor_as_scaling_is_a_number(backend, kind):
    arguments, dy = make(5, 9, 70, 2, kind=kind), torch.randn(5, 9)
    expected = results(ops.lora_linear, arguments, dy)
    got = results(ops.lora_linear, arguments | {"scaling": torch.tensor(1.5)}, dy)
    for name in expected:
        assert_same(got[name], expected[name])


@pytest.mark.parametrize("m", [1, 8])
def test_int16_decode_is_near_and_only_without_a_gradient(m):
    arguments = make(m, 96, 512, 4)
    with ops.use_backend("reference"):
        exact = ops.lora_linear(**to_float64(arguments))
    plain = ops.lora_linear(**arguments)
    ops.set_decode_int16(True)
    try:
        with torch.no_grad():
            rounded = ops.lora_linear(**arguments)
        assert torch.equal(ops.lora_linear(**arguments), plain)
    finally:
        ops.set_decode_int16(False)
    assert (rounded.double() - exact).norm() <= 2e-4 * exact.norm()
    assert torch.equal(rounded, plain) != _native.C.has("linear_4bit_int16")


@pytest.mark.parametrize("dtypes", [*itertools.permutations(DTYPES, 2)])
@pytest.mark.parametrize("m", [5, 50])
def test_x_and_dense_weight_of_different_dtypes(backend, m, dtypes):
    arguments = make(m, 9, 70, 2, kind="dense")
    arguments["x"] = arguments["x"].to(dtypes[0])
    arguments["weight"] = arguments["weight"].to(dtypes[1])
    y = ops.lora_linear(**arguments)
    with ops.use_backend("reference"):
        exact = ops.lora_linear(**to_float64(arguments))
        magnitude = ops.lora_linear(**absolute(to_float64(arguments)))
    assert_close("y", y, exact, exact.to(dtypes[0]), magnitude)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_negated_views_are_read_as_what_they_stand_for(backend, kind):
    arguments = make(3, 9, 70, 2, kind=kind)
    negated = {
        name: torch._neg_view(-value) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    assert_same(ops.lora_linear(**negated), ops.lora_linear(**arguments))


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("m", [1, 50])
def test_autocast_changes_nothing_inside(backend, m, kind):
    arguments, dy = make(m, 9, 70, 2, kind=kind), torch.randn(m, 9)
    expected = results(ops.lora_linear, arguments, dy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(ops.lora_linear, arguments, dy)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def test_tensors_without_memory():
    arguments = make(3, 9, 70, 2, kind="dense")
    on_meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    assert ops.lora_linear(**on_meta, dropout_p=0.5, training=False).shape == (3, 9)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_default_device_and_dtype_do_not_matter(backend, kind):
    arguments = make(3, 9, 70, 2, kind=kind)
    expected = ops.lora_linear(**arguments)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        assert torch.equal(ops.lora_linear(**arguments), expected)
        assert ops.lora_linear(**arguments, dropout_p=0.5).dtype == torch.float32
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_modes_that_watch_ops_see_ours(backend, kind):
    """A mode may replace memory by fakes: then no kernel may be handed an address."""
    arguments = make(3, 9, 70, 2, kind=kind)
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = ops.lora_linear(**arguments, dropout_p=0.5)
    assert isinstance(y, FakeTensor)
    assert y.shape == (3, 9)


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"x": torch.zeros(2, 63)}, ValueError, r"x must have shape \[\.\.\., 64\], got \[2, 63\]"),
        ({"x": torch.tensor(0.0)}, ValueError, "x must have shape"),
        ({"x": torch.zeros(2, 64, dtype=torch.int64)}, TypeError, "x must be .*int64"),
        ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
        ({"weight": torch.zeros(64)}, ValueError, r"weight must be a matrix"),
        ({"weight": "nf4"}, TypeError, "weight must be a tensor or a QuantizedWeight, got str"),
        ({"weight": torch.zeros(8, 64, dtype=torch.uint8)}, TypeError, "weight must be .*uint8"),
        ({"weight": torch.zeros(8, 64, requires_grad=True)}, ValueError, "weight requires grad"),
        ({"weight": torch.zeros(8, 64, device="meta")}, ValueError, "weight is on meta"),
        ({"lora_A": torch.zeros(2, 63)}, ValueError, r"lora_A must have shape \[r, 64\]"),
        ({"lora_A": torch.zeros(0, 64)}, ValueError, r"lora_A .* r > 0"),
        ({"lora_A": torch.zeros(64)}, ValueError, r"lora_A must be a matrix"),
        ({"lora_A": torch.zeros(3, 64)}, ValueError, r"lora_B must have shape \[8, 3\]"),
        ({"lora_B": torch.zeros(2, 8)}, ValueError, r"lora_B must have shape \[8, 2\]"),
        ({"lora_B": torch.zeros(8, 2, dtype=torch.int8)}, TypeError, "lora_B must be .*int8"),
        ({"lora_B": torch.zeros(8, 2, device="meta")}, ValueError, "lora_B is on meta"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias must have shape \(8,\)"),
        ({"lora_bias": torch.zeros(7)}, ValueError, r"lora_bias must have shape \(8,\)"),
        ({"scaling": torch.ones(2)}, ValueError, "scaling must be a number or a 0-d tensor"),
        ({"scaling": "1"}, TypeError, "scaling must be a number or a 0-d tensor, got str"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1, got 1.5"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p"),
    ],
)
def test_bad_arguments(arguments, error, names):
    good = make(2, 8, 64, 2, kind="dense")
    with pytest.raises(error, match=names):
        ops.lora_linear(**(good | arguments))


# --- torch.library --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "fp4 nested"])
def test_opcheck(backend, kind):
    a = leaves(make(6, 8, 70, 2, kind=kind))
    tail = (a["lora_A"], a["lora_B"], 1.5, a["bias"], a["lora_bias"], 0.3, torch.tensor([5]), False)
    forward = (a["x"].view(2, 3, 70), *flatten(a["weight"]), *tail)
    torch.library.opcheck(torch.ops.fusetune.lora_linear.default, forward, atol=1e-4, rtol=0)
    plain = [t.detach() for t in (a["x"], a["lora_A"], a["lora_B"])]
    backward = (torch.randn(6, 8), plain[0], *flatten(a["weight"]), *plain[1:], torch.randn(6, 2))
    for need in ((True, True, True), (False, True, False)):
        torch.library.opcheck(
            torch.ops.fusetune.lora_linear_backward.default,
            (*backward, 1.5, 0.3, torch.tensor([5]), *need),
        )


@pytest.mark.parametrize("scaling", [1.5, torch.tensor(1.5)])
@pytest.mark.parametrize("kind", ["dense", "fp4 nested"])
def test_compiles_in_one_graph(fresh_compiler, backend, kind, scaling):
    compiled = torch.compile(ops.lora_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (3, 7):
        arguments = make(m, 8, 70, 2, kind=kind) | {"scaling": scaling}
        dy = torch.randn(m, 8)
        torch.manual_seed(3)
        expected = results(ops.lora_linear, arguments, dy, dropout_p=0.3)
        torch.manual_seed(3)
        got = results(compiled, arguments, dy, dropout_p=0.3)
        for name in expected:
            assert_same(got[name], expected[name], name)


def test_inductor_keeps_the_statistics_of_dropout(fresh_compiler):
    """Inductor draws the seed from a generator of its own: only the keep rate can be compared."""
    k = 1 << 14
    x, weight = torch.ones(4, k), torch.zeros(1, k)
    a, b = torch.ones(1, k), torch.ones(1, 1)
    compiled = torch.compile(ops.lora_linear, fullgraph=True)
    rates = compiled(x, weight, a, b, 1.0, dropout_p=0.25).flatten() * 0.75 / k
    # Five standard deviations of a mean of k draws.
    assert ((rates - 0.75).abs() < 5 * (0.25 * 0.75 / k) ** 0.5).all()
    assert rates.unique().numel() > 1
