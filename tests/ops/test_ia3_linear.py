"""ia3_linear against the float64 reference, on every backend, and against PEFT's formula."""

import itertools

import pytest
import torch
from backends import TRITON
from lora_cases import DTYPES, WEIGHTS, absolute, to_float64
from tolerance import assert_close, assert_same, one_thread
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import linear

from fusetune import ops
from fusetune.ops._weight import flatten

F32, F16, BF16 = DTYPES
NAMES = ("x", "scale", "bias")
PLACES = pytest.mark.parametrize("feedforward", [False, True], ids=["output", "input"])
SHAPES = ((1, 7, 1), (2, 33, 130), (37, 97, 101), (131, 2100, 9))


def make(m, n, k, feedforward, dtype=F32, kind="nf4", adapter=F32):
    """Arguments: one factor is zero and one negative, where there are enough."""
    scale = torch.rand(k if feedforward else n) + 0.5
    scale[1:2] = 0
    scale[2:3] *= -1
    return {
        "x": torch.randn(m, k).to(dtype),
        "weight": WEIGHTS[kind](torch.randn(n, k).to(dtype)),
        "scale": scale.to(adapter),
        "bias": torch.randn(n).to(dtype),
        "feedforward": feedforward,
    }


def eager(x, weight, scale, bias, feedforward):
    """As PEFT 0.21 computes it: ia3.Linear.forward."""
    dense = weight if isinstance(weight, torch.Tensor) else ops.dequantize_4bit(weight, x.dtype)
    if feedforward:
        return linear((x.to(scale.dtype) * scale).to(x.dtype), dense, bias)
    return (linear(x, dense, bias) * scale).to(x.dtype)


def leaves(arguments, names=NAMES):
    return {
        name: value.detach().clone().requires_grad_()
        if name in names and value is not None
        else value
        for name, value in arguments.items()
    }


def results(function, arguments, dy, names=NAMES):
    """y and the gradient of every argument of `names`, by name."""
    arguments = leaves(arguments, names)
    y = function(**arguments)
    y.backward(dy)
    grads = {f"d{n}": arguments[n].grad for n in names if arguments[n] is not None}
    return {"y": y.detach(), **grads}


def check(arguments):
    dy = torch.randn(arguments["x"].shape[0], arguments["weight"].shape[0]).to(arguments["x"].dtype)
    got = results(ops.ia3_linear, arguments, dy)
    with one_thread(), ops.use_backend("reference"):
        exact = results(ops.ia3_linear, to_float64(arguments), dy.double())
        plain = results(eager, arguments, dy)
        sizes = absolute({n: v for n, v in to_float64(arguments).items() if n != "feedforward"})
        sizes["feedforward"] = arguments["feedforward"]
        magnitude = results(ops.ia3_linear, sizes, dy.double().abs())
    if dy.dtype != F32:
        # What these sum (z or dy W; scaled x) was rounded to 16 bits: eps / 2, not 2 of fp32's.
        rounding = torch.finfo(dy.dtype).eps / (4 * torch.finfo(F32).eps)
        for name in ("dscale", "y") if arguments["feedforward"] else ("dscale",):
            magnitude[name] = magnitude[name] * rounding
    for name in got:
        assert_close(name, got[name], exact[name], plain[name], magnitude[name])


@PLACES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(backend, shape, kind, dtype, feedforward):
    check(make(*shape, feedforward, dtype, kind))


# M, N, K, dtype of activations, weight, dtype of the vector.
ON_GPU = (
    (1, 48, 64, BF16, "nf4", F32),
    (70, 40, 136, F16, "fp4 nested", F32),
    (33, 65, 56, F32, "nf4", F32),
    (19, 40, 48, BF16, "dense", BF16),
)


@PLACES
@pytest.mark.parametrize(
    ("backend", "case"), [*itertools.product(TRITON, ON_GPU)], indirect=["backend"], ids=str
)
def test_on_gpus(backend, case, feedforward):
    m, n, k, *rest = case
    check(make(m, n, k, feedforward, *rest))


@PLACES
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_a_vector_in_16_bits_and_no_bias(backend, kind, dtype, feedforward):
    check(make(50, 33, 70, feedforward, dtype, kind, adapter=dtype) | {"bias": None})


@PLACES
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_the_definition_is_pefts(kind, feedforward):
    """Both in float64: y and every gradient."""
    arguments = to_float64(make(7, 9, 33, feedforward, kind=kind))
    dy = torch.randn(7, 9, dtype=torch.float64)
    got, expected = results(ops.ia3_linear, arguments, dy), results(eager, arguments, dy)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-12, msg=name)


@PLACES
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_gradients_numerically(kind, feedforward):
    arguments = leaves(to_float64(make(3, 5, 9, feedforward, kind=kind)))

    def function(*values):
        return ops.ia3_linear(**arguments | dict(zip(NAMES, values, strict=True)))

    assert torch.autograd.gradcheck(function, [arguments[name] for name in NAMES])


# --- what is kept, and what may be done to it -----------------------------------------------------


@PLACES
@pytest.mark.parametrize("trained", [NAMES, ("x", "bias")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_saved(backend, dtype, trained, feedforward):
    """No scaled copy: x by reference, or z, and neither without a vector that is trained."""
    m, n, k = 50, 60, 70
    arguments = leaves(make(m, n, k, feedforward, dtype), trained)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.ia3_linear(**arguments)
    own = {arguments[name].data_ptr() for name in NAMES}
    others = [tuple(t.shape) for t in saved if t.numel() and t.data_ptr() not in own]
    assert others == ([(m, n)] if "scale" in trained and not feedforward else [])
    has_x = arguments["x"].data_ptr() in {t.data_ptr() for t in saved if t.numel()}
    assert has_x == (feedforward and "scale" in trained)


@PLACES
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_any_subset_may_require_grad(backend, kind, feedforward):
    arguments, dy = make(70, 9, 70, feedforward, kind=kind), torch.randn(70, 9)
    full = results(ops.ia3_linear, arguments, dy)
    for size in range(1, len(NAMES) + 1):
        for subset in itertools.combinations(NAMES, size):
            for name, value in results(ops.ia3_linear, arguments, dy, subset).items():
                assert_same(value, full[name], str(subset))
    assert not ops.ia3_linear(**arguments).requires_grad
    assert_same(ops.ia3_linear(**arguments), full["y"])


@PLACES
def test_y_may_be_changed_in_place(backend, feedforward):
    arguments = make(5, 9, 70, feedforward)
    expected = results(lambda **a: ops.ia3_linear(**a).relu(), arguments, torch.ones(5, 9))
    got = results(lambda **a: ops.ia3_linear(**a).relu_(), arguments, torch.ones(5, 9))
    for name in expected:
        assert torch.equal(got[name], expected[name])


@PLACES
def test_differentiating_twice_is_refused(backend, feedforward):
    arguments = leaves(make(3, 9, 64, feedforward))
    y = ops.ia3_linear(**arguments).square().sum()
    (dx,) = torch.autograd.grad(y, arguments["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


@PLACES
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("m", [2, 40])
def test_leading_dimensions_and_strides(backend, m, kind, feedforward):
    arguments = make(m, 24, 70, feedforward, kind=kind)
    base = torch.randn(m, 3, 140)
    variants = {
        "vector": base[0, 0, :70],
        "three dimensions": base[..., :70],
        "every second column": base[..., ::2],
        "transposed": torch.randn(70, m).T,
        "expanded": torch.randn(1, 70).expand(m, 70),
    }
    strided = {name: arguments[name].repeat_interleave(2)[::2] for name in ("scale", "bias")}
    if kind == "dense":
        strided["weight"] = arguments["weight"].T.contiguous().T
    for name, x in variants.items():
        rows = x.contiguous().reshape(-1, 70)
        expected = results(ops.ia3_linear, arguments | {"x": rows}, torch.ones(len(rows), 24))
        inputs = leaves(arguments | strided)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = ops.ia3_linear(**(inputs | {"x": leaf.expand(x.shape)}))
        assert_same(y.flatten(), expected["y"].flatten(), name)
        y.sum().backward()  # sum's gradient is an expanded scalar
        assert_same(leaf.grad.flatten(), expected["dx"].flatten(), name)
        for other in NAMES[1:]:
            assert_same(inputs[other].grad, expected[f"d{other}"], f"{name} {other}")


@PLACES
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_rows(backend, shape, kind, feedforward):
    arguments = leaves(make(1, 8, 64, feedforward, kind=kind) | {"x": torch.randn(shape)})
    y = ops.ia3_linear(**arguments)
    assert y.shape == (*shape[:-1], 8)
    y.sum().backward()
    for name in NAMES:
        assert torch.equal(arguments[name].grad, torch.zeros_like(arguments[name])), name


@PLACES
def test_autocast_changes_nothing_inside(backend, feedforward):
    arguments, dy = make(20, 9, 70, feedforward, kind="dense"), torch.randn(20, 9)
    expected = results(ops.ia3_linear, arguments, dy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(ops.ia3_linear, arguments, dy)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"x": torch.zeros(2, 63)}, ValueError, r"x must have shape \[\.\.\., 64\], got \[2, 63\]"),
        ({"weight": torch.zeros(8, 64, requires_grad=True)}, ValueError, "weight requires grad"),
        ({"weight": torch.zeros(8)}, ValueError, r"weight must be a matrix \[N, K\], got"),
        ({"weight": [1.0]}, TypeError, "weight must be a tensor or a QuantizedWeight, got list"),
        ({"scale": torch.zeros(7)}, ValueError, r"scale must have shape \(8,\)"),
        ({"scale": torch.zeros(8), "feedforward": True}, ValueError, r"scale .* \(64,\)"),
        ({"scale": torch.zeros(8, dtype=torch.int64)}, TypeError, "scale must be .*int64"),
        ({"scale": None}, TypeError, "scale must be a tensor, got NoneType"),
        ({"scale": torch.zeros(8, device="meta")}, ValueError, "scale is on meta"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias must have shape \(8,\)"),
    ],
)
def test_bad_arguments(arguments, error, names):
    good = make(2, 8, 64, False, kind="dense")
    with pytest.raises(error, match=names):
        ops.ia3_linear(**(good | arguments))


# --- torch.library --------------------------------------------------------------------------------


@PLACES
@pytest.mark.parametrize("kind", ["dense", "fp4 nested"])
def test_opcheck(backend, kind, feedforward):
    a = leaves(make(6, 8, 70, feedforward, kind=kind))
    x, *weight = a["x"], *flatten(a["weight"])
    op, backward = torch.ops.fusetune.ia3_linear, torch.ops.fusetune.ia3_linear_backward
    given = (a["scale"], a["bias"])
    arguments = (x.view(2, 3, 70), *weight, *given, feedforward, not feedforward)
    torch.library.opcheck(op.default, arguments, atol=1e-4, rtol=0)
    given = [t.detach() for t in given]
    z = torch.randn(0) if feedforward else torch.randn(6, 8)
    saved = (x.detach() if feedforward else None, *weight, *given, z, feedforward)
    for need in ((True,) * 3, (False, True, False)):
        torch.library.opcheck(backward.default, (torch.randn(6, 8), *saved, *need))


@PLACES
def test_compiles_in_one_graph(fresh_compiler, backend, feedforward):
    compiled = torch.compile(ops.ia3_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (3, 7):
        arguments, dy = make(m, 8, 70, feedforward, kind="fp4 nested"), torch.randn(m, 8)
        expected = results(ops.ia3_linear, arguments, dy)
        for name, value in results(compiled, arguments, dy).items():
            assert_same(value, expected[name], name)


@PLACES
def test_modes_that_watch_ops_see_ours(backend, feedforward):
    """A mode may replace memory by fakes: then no kernel may be handed an address."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = ops.ia3_linear(**make(3, 9, 70, feedforward, kind="dense"))
    assert isinstance(y, FakeTensor)
    assert y.shape == (3, 9)
