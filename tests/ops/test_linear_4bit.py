"""linear_4bit against the float64 reference, on every backend."""

import itertools

import pytest
import torch
from backends import GPU, HOST
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close, assert_same, one_thread

from fusetune import _native, ops
from fusetune.ops._weight import flatten
from fusetune.reference import linear_4bit as reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# (M, N, K): one row and several; odd and prime; K below, at and across blocks of 64; wide and tall.
SHAPES = (
    (1, 48, 64),
    (1, 7, 1),
    (2, 33, 130),
    (8, 128, 256),
    (9, 64, 577),
    (27, 40, 832),
    (31, 97, 101),
    (64, 17, 192),
    (130, 257, 320),
    (530, 40, 96),
)
WEIGHTS = {
    "nf4": {},
    "fp4": {"quant_type": "fp4"},
    "nested": {"double_quant": True},
    "wide": {"blocksize": 4096},
    "narrow": {"blocksize": 32, "double_quant": True},
}


def make(n, k, **options):
    with ops.use_backend("auto"):  # few backends quantise
        return ops.quantize_4bit(torch.randn(n, k), **options)


def run(x, w, bias, dy):
    """y, dx and dbias of linear_4bit."""
    x, bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
    y = ops.linear_4bit(x, w, bias)
    y.backward(dy)
    return y.detach(), x.grad, bias.grad


def eager(x, w, bias, dy):
    """The same by dequantising and nn.functional.linear, in x's dtype."""
    x, bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
    y = torch.nn.functional.linear(x, ops.dequantize_4bit(w, x.dtype), bias)
    y.backward(dy)
    return y.detach(), x.grad, bias.grad


def check(x, w, bias, dy):
    got = run(x, w, bias, dy)
    with one_thread(), ops.use_backend("reference"):
        exact = run(x.double(), w, bias.double(), dy.double())
        dense = ops.dequantize_4bit(w, torch.float64).abs()
        plain = eager(x, w, bias, dy)
    ax, ab, ady = (t.double().abs() for t in (x, bias, dy))
    magnitude = (torch.nn.functional.linear(ax, dense, ab), ady @ dense, ady.sum(0))
    for name, *results in zip(("y", "dx", "dbias"), got, exact, plain, magnitude, strict=True):
        assert_close(name, *results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(backend, shape, kind, dtype):
    m, n, k = shape
    w = make(n, k, **WEIGHTS[kind])
    check(torch.randn(m, k).to(dtype), w, torch.randn(n).to(dtype), torch.randn(m, n).to(dtype))


# On GPUs: few of them, as simulated they take up to a second each. K a multiple of 32, for the
# kernels that read packed codes, and not; M within and above their reach.
F32, F16, BF16 = DTYPES
ON_GPU = (
    (1, 48, 1056, "nested", F16),
    (2, 33, 130, "nf4", F16),
    (5, 40, 96, "fp4", F32),
    (8, 128, 256, "narrow", BF16),
    (9, 64, 577, "nf4", F32),
    (31, 97, 160, "wide", BF16),
    (64, 17, 192, "nested", F16),
    (130, 257, 320, "nf4", BF16),
    (260, 40, 96, "nested", F16),
)


@pytest.mark.parametrize(
    ("backend", "case"),
    [*itertools.product(GPU, ON_GPU)],
    indirect=["backend"],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_on_gpus(backend, case):
    m, n, k, kind, dtype = case
    w = make(n, k, **WEIGHTS[kind])
    check(torch.randn(m, k).to(dtype), w, torch.randn(n).to(dtype), torch.randn(m, n).to(dtype))


def test_relative_error_of_the_cpu_kernel():
    """fp32: at most 5e-7 of the exact product's norm, at a size of a real layer."""
    x, w = torch.randn(37, 2048), make(512, 2048, double_quant=True)
    exact = reference.linear_4bit(x.double(), w)
    exact_dx = reference.linear_4bit_dx(exact.float().double(), w)
    with ops.use_backend("cpu"):
        y = ops.linear_4bit(x, w)
        assert (y.double() - exact).norm() <= 5e-7 * exact.norm()
        x.requires_grad_()
        ops.linear_4bit(x, w).backward(exact.float())
    assert (x.grad.double() - exact_dx).norm() <= 5e-7 * exact_dx.norm()


@pytest.mark.parametrize("m", [1, 8, 40])
def test_leading_dimensions_and_strides(backend, m):
    w, bias = make(24, 70), torch.randn(24)
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
    for name, x in variants.items():
        y = ops.linear_4bit(x, w, bias)
        expected = ops.linear_4bit(x.contiguous().reshape(-1, 70), w, bias)
        assert_same(y, expected.view(*x.shape[:-1], 24), name)
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        ops.linear_4bit(x, w).sum().backward()  # sum's gradient is an expanded scalar
        expected = ops.dequantize_4bit(w).double().sum(0).float().expand(x.shape)
        assert_same(x.grad, expected, name)


@pytest.mark.parametrize("backend", [*HOST, *GPU], indirect=True)
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (0, 3, 64)])
def test_no_rows(backend, shape):
    x = torch.randn(shape, requires_grad=True)
    bias = torch.zeros(8, requires_grad=True)
    y = ops.linear_4bit(x, make(8, 64), bias)
    assert y.shape == (*shape[:-1], 8)
    y.sum().backward()
    assert x.grad.shape == shape
    assert torch.equal(bias.grad, torch.zeros(8))


@pytest.mark.parametrize("backend", [*HOST, *GPU], indirect=True)
def test_no_columns_and_no_outputs(backend):
    bias = torch.randn(8)
    assert torch.equal(ops.linear_4bit(torch.randn(3, 0), make(8, 0), bias), bias.expand(3, 8))
    assert ops.linear_4bit(torch.randn(3, 64), make(0, 64)).shape == (3, 0)


@settings(max_examples=80, deadline=None)
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 90),
    k=st.integers(1, 200),
    kind=st.sampled_from(sorted(WEIGHTS)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape(m, n, k, kind, dtype, seed):
    torch.manual_seed(seed)
    w = make(n, k, **WEIGHTS[kind])
    with ops.use_backend("cpu"):
        check(torch.randn(m, k).to(dtype), w, torch.randn(n).to(dtype), torch.randn(m, n).to(dtype))


def test_gradients_numerically():
    w = make(5, 11)
    x = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: ops.linear_4bit(x, w, b), (x, bias))


@pytest.mark.parametrize("backend", [*HOST, *GPU], indirect=True)
def test_only_what_is_asked_for_is_computed(backend):
    w, x, bias = make(8, 64), torch.randn(3, 64), torch.randn(8)
    assert not ops.linear_4bit(x, w, bias).requires_grad
    bias.requires_grad_()
    ops.linear_4bit(x, w, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((8,), 3.0))
    with torch.no_grad():
        assert not ops.linear_4bit(x, w, bias).requires_grad


def test_nothing_is_saved_for_backward():
    saved = []
    x = torch.randn(9, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.linear_4bit(x, make(8, 64), torch.randn(8, requires_grad=True))
    assert saved == []


def test_second_derivative():
    w = make(3, 9)
    x = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, b: ops.linear_4bit(x, w, b).tanh(), (x, bias))


@pytest.mark.parametrize("m", [1, 3, 8])
def test_int16_decode_is_near_and_only_where_allowed(m):
    x, w, bias = torch.randn(m, 512), make(96, 512, double_quant=True), torch.randn(96)
    exact = reference.linear_4bit(x.double(), w, bias.double())
    plain = ops.linear_4bit(x, w, bias)
    ops.set_decode_int16(True)
    try:
        with torch.no_grad():
            rounded = ops.linear_4bit(x, w, bias)
        assert (rounded.double() - exact).norm() <= 2e-4 * exact.norm()
        # Another result shows that the path was taken, where the instruction set has it.
        assert torch.equal(rounded, plain) != _native.C.has("linear_4bit_int16")
        assert torch.equal(ops.linear_4bit(x.requires_grad_(), w, bias), plain)
    finally:
        ops.set_decode_int16(False)
    assert torch.equal(ops.linear_4bit(x, w, bias), plain)


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"x": torch.zeros(2, 63)}, ValueError, r"x must have shape \[\.\.\., 64\], got \[2, 63\]"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape"),
        ({"x": torch.zeros(2, 64, dtype=torch.int64)}, TypeError, "x must be .*int64"),
        ({"x": torch.zeros(2, 64, dtype=torch.complex64)}, TypeError, "x must be .*complex64"),
        ({"x": [0.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.zeros(2, 64, device="meta")}, ValueError, "w is on cpu, x on meta"),
        ({"w": torch.zeros(8, 64)}, TypeError, "w must be a QuantizedWeight, got Tensor"),
        ({"w": None}, TypeError, "w must be a QuantizedWeight, got NoneType"),
        ({"w": ops.quantize_4bit(torch.zeros(64))}, ValueError, r"w must be a matrix"),
        ({"bias": torch.zeros(9)}, ValueError, r"bias must have shape \(8,\), got \(9,\)"),
        ({"bias": torch.zeros(1, 8)}, ValueError, r"bias must have shape"),
        ({"bias": torch.zeros(8, dtype=torch.int8)}, TypeError, "bias must be .*int8"),
        ({"bias": torch.zeros(8, device="meta")}, ValueError, "bias is on meta, x on cpu"),
    ],
)
def test_bad_arguments(arguments, error, names):
    good = {"x": torch.zeros(2, 64), "w": ops.quantize_4bit(torch.zeros(8, 64))}
    with pytest.raises(error, match=names):
        ops.linear_4bit(**(good | arguments))


def test_a_backend_that_cannot_run_says_why():
    x, w = torch.randn(2, 64, dtype=torch.float64), make(8, 64)
    assert ops.linear_4bit(x, w).dtype == torch.float64  # auto falls back
    with ops.use_backend("cpu"), pytest.raises(ValueError, match=r"no kernel for torch\.float64"):
        ops.linear_4bit(x, w)
    for gpu in ("triton", "cuda"):
        with ops.use_backend(gpu), pytest.raises(ValueError, match="the tensors are on cpu"):
            ops.linear_4bit(x.float(), w)
    with pytest.raises(ValueError, match="backend must be one of"):
        ops.set_backend("gpu")


@pytest.mark.parametrize("double_quant", [False, True])
def test_opcheck(backend, double_quant):
    w = make(8, 70, double_quant=double_quant)
    x, bias = torch.randn(2, 3, 70, requires_grad=True), torch.randn(8, requires_grad=True)
    torch.library.opcheck(
        torch.ops.fusetune.linear_4bit.default, (x, *flatten(w), bias, False), atol=1e-4, rtol=0
    )
    torch.library.opcheck(torch.ops.fusetune.linear_4bit_dx.default, (x[..., :8], *flatten(w)))


@pytest.mark.parametrize("backend", [*HOST, *GPU], indirect=True)
def test_compiles_in_one_graph(fresh_compiler, backend):
    w, bias = make(8, 70, double_quant=True), torch.randn(8, requires_grad=True)
    compiled = torch.compile(ops.linear_4bit, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (3, 5):
        x = torch.randn(m, 70, requires_grad=True)
        y, expected = compiled(x, w, bias), ops.linear_4bit(x, w, bias)
        assert torch.equal(y, expected)
        dy = torch.randn(m, 8)
        for got, wanted in zip(
            torch.autograd.grad(y, (x, bias), dy),
            torch.autograd.grad(expected, (x, bias), dy),
            strict=True,
        ):
            assert torch.equal(got, wanted)
