"""linear against the float64 reference, on every backend that has a kernel of its own."""

import pytest
import torch
from backends import HOST
from tolerance import assert_close, one_thread

from fusetune import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# (M, N, K): below and above the 128 rows from which fp32 has a macro kernel of its own, whole and
# cut vectors of columns and groups of 8 rows, one and several slices of the reduction.
SHAPES = (
    (1, 48, 64),
    (1, 7, 1),
    (9, 64, 577),
    (37, 97, 101),
    (128, 48, 96),
    (131, 101, 1301),
    (200, 1200, 33),
    (1030, 17, 65),
)


@pytest.fixture(params=HOST)
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


def run(x, weight, bias, dy):
    """y, dx and dbias of ops.linear."""
    x, bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
    y = ops.linear(x, weight, bias)
    y.backward(dy)
    return y.detach(), x.grad, bias.grad


def eager(x, weight, bias, dy):
    x, bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
    y = torch.nn.functional.linear(x, weight, bias)
    y.backward(dy)
    return y.detach(), x.grad, bias.grad


def check(x, weight, bias, dy):
    got = run(x, weight, bias, dy)
    with one_thread(), ops.use_backend("reference"):
        exact = run(x.double(), weight.double(), bias.double(), dy.double())
        plain = eager(x, weight, bias, dy)
    ax, aw, ab, ady = (t.double().abs() for t in (x, weight, bias, dy))
    magnitude = (torch.nn.functional.linear(ax, aw, ab), ady @ aw, ady.sum(0))
    for name, *results in zip(("y", "dx", "dbias"), got, exact, plain, magnitude, strict=True):
        assert_close(name, *results)


def make(m, n, k, dtype=torch.float32):
    sizes = ((m, k), (n, k), (n,), (m, n))
    return tuple(torch.randn(size).to(dtype) for size in sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(backend, shape, dtype):
    check(*make(*shape, dtype))


@pytest.mark.parametrize("m", [5, 150])
def test_strides_that_a_kernel_cannot_read(backend, m):
    x, weight, bias, dy = make(m, 40, 72)
    check(x.T.contiguous().T, weight.T.contiguous().T, bias, dy)
    check(x[:, ::2], weight[:, ::2], bias, dy)
    wide = torch.randn(m, 100)
    check(wide[:, 7:79], torch.randn(40, 90)[:, 9:81], bias, dy)


def test_empty(backend):
    weight = torch.randn(6, 8)
    assert ops.linear(torch.empty(0, 8), weight).shape == (0, 6)
    assert ops.linear(torch.empty(2, 0, 8), weight).shape == (2, 0, 6)
    assert torch.equal(ops.linear(torch.empty(300, 0), torch.empty(6, 0)), torch.zeros(300, 6))


def test_whole_output_is_written(backend, monkeypatch):
    from fusetune.ops import _cpu

    def full_of_nan(*shape, dtype):
        return torch.full(shape, torch.nan, dtype=dtype)

    monkeypatch.setattr(_cpu, "empty", full_of_nan)
    check(*make(133, 99, 1201))


def test_second_derivative(backend):
    x, weight, bias, _ = make(140, 9, 11)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(ops.linear(x, weight, bias).square().sum(), x, create_graph=True)
    (got,) = torch.autograd.grad(dx.sum(), x)
    expected = (2 * torch.ones(140, 11) @ weight.T) @ weight
    torch.testing.assert_close(got, expected)


def test_does_not_depend_on_threads(backend):
    arguments = make(257, 211, 130)
    with one_thread():
        alone = run(*arguments)
    for name, a, b in zip(("y", "dx"), run(*arguments), alone, strict=False):
        torch.testing.assert_close(a, b, msg=name)


def test_opcheck():
    x, weight, bias, _ = make(3, 5, 7)
    arguments = (x.requires_grad_(), weight, bias.requires_grad_())
    torch.library.opcheck(torch.ops.fusetune.linear.default, arguments)
    torch.library.opcheck(torch.ops.fusetune.linear_dx.default, (torch.randn(3, 5), weight))


def test_compiles_without_a_graph_break():
    x, weight, bias, _ = make(3, 5, 7)
    function = torch.compile(ops.linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(function(x, weight, bias), ops.linear(x, weight, bias))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(3, 6)}, ValueError, "x must have shape"),
        ({"x": torch.ones(3, 7, dtype=torch.int64)}, TypeError, "x must be float16"),
        ({"weight": torch.randn(7)}, ValueError, "weight must be a matrix"),
        ({"weight": "w"}, TypeError, "weight must be a tensor"),
        ({"weight": torch.randn(5, 7, requires_grad=True)}, ValueError, "weight requires grad"),
        ({"bias": torch.randn(4)}, ValueError, "bias must have shape"),
    ],
)
def test_bad_arguments(change, error, message):
    x, weight, bias, _ = make(3, 5, 7)
    with pytest.raises(error, match=message):
        ops.linear(**({"x": x, "weight": weight, "bias": bias} | change))
