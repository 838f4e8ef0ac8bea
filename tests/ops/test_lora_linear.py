"""lora_linear against the float64 reference, on every backend."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close, assert_same
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from fusetune import ops
from fusetune.ops._weight import flatten
from fusetune.reference.dropout import keep_mask, new_seed

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WEIGHTS = {
    "dense": lambda w: w,
    "nf4": lambda w: ops.quantize_4bit(w.float()),
    "fp4 nested": lambda w: ops.quantize_4bit(w.float(), quant_type="fp4", double_quant=True),
}
NAMES = ("x", "lora_A", "lora_B", "bias", "lora_bias")


def make(m, n, k, r, dtype=torch.float32, kind="nf4", adapter=torch.float32):
    """Arguments of lora_linear: activations, weight and bias in `dtype`, the rest in `adapter`."""
    return {
        "x": torch.randn(m, k).to(dtype),
        "weight": WEIGHTS[kind](torch.randn(n, k).to(dtype)),
        "lora_A": torch.randn(r, k).to(adapter) / k**0.5,
        "lora_B": torch.randn(n, r).to(adapter) / r**0.5,
        "scaling": 1.5,
        "bias": torch.randn(n).to(dtype),
        "lora_bias": torch.randn(n).to(adapter),
    }


def leaves(arguments):
    """The same arguments with new leaves that require grad in place of the differentiable ones."""
    return {
        name: value.detach().clone().requires_grad_()
        if name in NAMES and value is not None
        else value
        for name, value in arguments.items()
    }


def to_float64(arguments):
    return {
        name: value.double() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def eager(x, weight, lora_A, lora_B, scaling, bias, lora_bias, *, dropout_p=0.0, seed=None):
    """What PEFT computes: the base layer in x's dtype, the adapter in its own."""
    dense = weight if isinstance(weight, torch.Tensor) else ops.dequantize_4bit(weight, x.dtype)
    low = x.to(lora_A.dtype)
    if seed is not None:
        low = low * keep_mask(*x.shape, dropout_p, seed) / (1 - dropout_p)
    delta = linear(linear(low, lora_A), lora_B, lora_bias) * scaling
    return (linear(x, dense, bias) + delta).to(x.dtype)


def results(function, arguments, dy, **options):
    """y and the gradient of every differentiable argument, by name."""
    arguments = leaves(arguments)
    y = function(**arguments, **options)
    y.backward(dy)
    grads = {f"d{n}": arguments[n].grad for n in NAMES if arguments[n] is not None}
    return {"y": y.detach(), **grads}


def absolute(arguments):
    """The arguments with absolute values, for the magnitude that rounding errors scale with."""
    weight = arguments["weight"]
    if not isinstance(weight, torch.Tensor):
        weight = ops.dequantize_4bit(weight, torch.float64)
    return {
        name: value.abs() if isinstance(value, torch.Tensor) else value
        for name, value in (arguments | {"weight": weight}).items()
    }


def check(arguments, dropout_p=0.0):
    m, n = arguments["x"].shape[0], arguments["lora_B"].shape[0]
    dy = torch.randn(m, n).to(arguments["x"].dtype)
    state = torch.get_rng_state()

    def run(function, arguments, dy, **options):
        torch.set_rng_state(state)  # the same mask in all of them
        return results(function, arguments, dy, dropout_p=dropout_p, **options)

    got = run(ops.lora_linear, arguments, dy)
    with ops.use_backend("reference"):
        exact = run(ops.lora_linear, to_float64(arguments), dy.double())
        magnitude = run(ops.lora_linear, absolute(to_float64(arguments)), dy.double().abs())
    torch.set_rng_state(state)
    plain = run(eager, arguments, dy, seed=new_seed(dy.device) if dropout_p else None)
    for name in got:
        assert_close(name, got[name], exact[name], plain[name], magnitude[name])


# The full grid of everything would be 10^5 cases. The kernels treat these independently: shape,
# dtype and weight (which matmul), rank (how the tail is cut), dropout, and which optional parts
# there are. So each is swept whole at one odd setting of the rest (dropout at every second shape;
# nested statistics, decoded before anything else happens, with shapes only); hypothesis mixes all.

SHAPES = (
    (1, 48, 64, 0.0),
    (1, 7, 1, 0.3),
    (2, 33, 130, 0.0),
    (8, 128, 256, 0.3),
    (9, 64, 577, 0.3),
    (37, 97, 101, 0.0),
    (130, 257, 320, 0.3),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(backend, shape, kind, dtype):
    *sizes, dropout_p = shape
    check(make(*sizes, 8, dtype, kind), dropout_p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("r", [1, 3, 8, 16, 64, 256])
def test_ranks(backend, r, kind, dtype):
    check(make(19, 83, 131, r, dtype, kind), 0.1)


@pytest.mark.parametrize("parts", [*itertools.product([False, True], repeat=2)])
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("m", [5, 50])
def test_optional_biases(backend, m, kind, parts):
    arguments = make(m, 33, 70, 4, kind=kind)
    for name, present in zip(("bias", "lora_bias"), parts, strict=True):
        if not present:
            arguments[name] = None
    check(arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("m", [5, 50])
def test_adapters_in_16_bits(backend, m, kind, dtype):
    check(make(m, 33, 70, 4, dtype, kind, adapter=dtype), 0.2)


@settings(max_examples=80, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 90),
    k=st.integers(1, 150),
    r=st.integers(1, 40),
    kind=st.sampled_from(sorted(WEIGHTS)),
    dtype=st.sampled_from(DTYPES),
    dropout_p=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(m, n, k, r, kind, dtype, dropout_p, seed):
    torch.manual_seed(seed)
    with ops.use_backend("cpu"):
        check(make(m, n, k, r, dtype, kind), dropout_p)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_gradients_numerically(kind):
    arguments = to_float64(make(3, 5, 9, 2, kind=kind))
    arguments = leaves(arguments)
    arguments["scaling"] = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    names = (*NAMES, "scaling")

    def function(*values):
        torch.manual_seed(1)  # the same mask at every call
        return ops.lora_linear(**(arguments | dict(zip(names, values, strict=True))), dropout_p=0.4)

    assert torch.autograd.gradcheck(function, [arguments[name] for name in names])


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("m", [4, 60])
def test_forward_and_backward_share_the_mask(backend, m, kind):
    """With a zero base weight and A, B of ones, y and dx show which elements of x were kept."""
    k = 70
    weight = torch.zeros(1, k) if kind == "dense" else ops.quantize_4bit(torch.zeros(1, k))
    x = (torch.rand(m, k) + 0.5).requires_grad_()
    a, b = torch.ones(1, k, requires_grad=True), torch.ones(1, 1)
    torch.manual_seed(7)
    y = ops.lora_linear(x, weight, a, b, 1.0, dropout_p=0.4)
    y.sum().backward()
    torch.manual_seed(7)
    kept = keep_mask(m, k, 0.4, new_seed(x.device)) / 0.6
    assert_same(x.grad, kept)
    assert_same(y.detach(), (x.detach() * kept).sum(1, keepdim=True))
    assert_same(a.grad, (x.detach() * kept).sum(0, keepdim=True))


def test_masks_follow_the_generator_and_differ_between_calls(backend):
    arguments = make(6, 9, 64, 2)
    state = torch.get_rng_state()
    first = ops.lora_linear(**arguments, dropout_p=0.5)
    second = ops.lora_linear(**arguments, dropout_p=0.5)
    torch.set_rng_state(state)
    again = ops.lora_linear(**arguments, dropout_p=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_no_dropout_draws_no_number(backend):
    arguments = make(6, 9, 64, 2)
    state = torch.get_rng_state()
    expected = ops.lora_linear(**arguments)
    assert torch.equal(ops.lora_linear(**arguments, dropout_p=0.5, training=False), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropping_everything_leaves_the_base(backend):
    arguments = make(6, 9, 64, 2) | {"lora_bias": None}
    got = ops.lora_linear(**arguments, dropout_p=1.0)
    base = ops.linear_4bit(arguments["x"], arguments["weight"], arguments["bias"])
    assert_same(got, base)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_masks(backend, use_reentrant):
    arguments = make(6, 9, 64, 2)

    def two_layers(x, a, b):
        layer = arguments | {"x": x, "lora_A": a, "lora_B": b}
        once = ops.lora_linear(**layer, dropout_p=0.3)
        return once.sum(1) + ops.lora_linear(**layer, dropout_p=0.3).sum(1)

    def grads(function):
        inputs = [arguments[n].clone().requires_grad_() for n in ("x", "lora_A", "lora_B")]
        torch.manual_seed(5)
        function(*inputs).sum().backward()
        return [t.grad for t in inputs]

    plain = grads(two_layers)
    recomputed = grads(lambda *i: checkpoint(two_layers, *i, use_reentrant=use_reentrant))
    for got, expected in zip(recomputed, plain, strict=True):
        assert torch.equal(got, expected)


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
