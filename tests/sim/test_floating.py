"""Floating-point arithmetic against numpy and torch, bit for bit where the result is exact."""

import math

import numpy as np
import pytest
import torch
from ptx_kernels import assert_same, calculate, floats

TYPES = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": np.fmin,
    "max": np.fmax,
}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def bf16(values):
    """float32 numbers that bfloat16 has, and their bits."""
    tensor = torch.from_numpy(values).bfloat16()
    return tensor.float().numpy(), tensor.view(torch.int16).numpy().view(np.uint16)


def to_bf16(values):
    return torch.from_numpy(np.asarray(values, np.float32)).bfloat16().view(torch.int16).numpy()


def same_bf16(bits, expected):
    """Bits of bfloat16 against float32 numbers, rounded."""
    got = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    want = torch.from_numpy(to_bf16(expected)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", BINARY)
def test_two_operands(name, kind):
    a, b = floats(dtype=TYPES[kind]), floats(seed=1, dtype=TYPES[kind])
    if name in ("min", "max"):  # the sign of a zero among zeros is another matter
        keep = (a != 0) | (b != 0)
        a, b = a[keep], b[keep]
    rounding = ".rn" if name in ("add", "sub", "mul") else ""
    out = calculate(f"{name}{rounding}.{kind} %out, %in0, %in1;", kind, (kind, a), (kind, b))
    assert_same(out, BINARY[name](a, b))


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_div(kind):
    a, b = floats(dtype=TYPES[kind]), floats(seed=1, dtype=TYPES[kind])
    out = calculate(f"div.rn.{kind} %out, %in0, %in1;", kind, (kind, a), (kind, b))
    assert_same(out, a / b)


@pytest.mark.parametrize("name", ["min", "max"])
def test_nan_goes_through_where_asked_for(name):
    a, b = floats(), floats(seed=1)
    keep = (a != 0) | (b != 0)
    operands = ("f32", a[keep]), ("f32", b[keep])
    function = np.minimum if name == "min" else np.maximum
    out = calculate(f"{name}.NaN.f32 %out, %in0, %in1;", "f32", *operands)
    assert_same(out, function(a[keep], b[keep]))


def test_three_operands_of_max():
    a, b, c = np.float32([1, 5, 2]), np.float32([4, 2, 2]), np.float32([3, 3, np.nan])
    out = calculate("max.f32 %out, %in0, %in1, %in2;", "f32", ("f32", a), ("f32", b), ("f32", c))
    np.testing.assert_array_equal(out, np.float32([4, 5, 2]))


@pytest.mark.parametrize("name", BINARY)
def test_bf16(name):
    (a, a_bits), (b, b_bits) = bf16(floats()), bf16(floats(seed=1))
    keep = (a != 0) | (b != 0)
    operands = ("bf16", a_bits[keep]), ("bf16", b_bits[keep])
    out = calculate(f"{name}.bf16 %out, %in0, %in1;", "bf16", *operands)
    same_bf16(out, BINARY[name](a[keep], b[keep]))


@pytest.mark.parametrize("name", ["add", "mul", "sub"])
def test_pairs(name):
    a, b = floats(401, dtype=np.float16), floats(401, seed=1, dtype=np.float16)
    pairs = a[: len(a) // 2 * 2].view(np.uint32), b[: len(b) // 2 * 2].view(np.uint32)
    out = calculate(f"{name}.f16x2 %out, %in0, %in1;", "f16x2", *(("f16x2", p) for p in pairs))
    assert_same(out.view(np.float16), BINARY[name](*(p.view(np.float16) for p in pairs)))
    (a, a_bits), (b, b_bits) = bf16(floats(400)), bf16(floats(400, seed=1))
    even = len(a) // 2 * 2
    pairs = (a_bits[:even].view(np.uint32), b_bits[:even].view(np.uint32))
    out = calculate(f"{name}.bf16x2 %out, %in0, %in1;", "bf16x2", *(("bf16x2", p) for p in pairs))
    same_bf16(out.view(np.uint16), BINARY[name](a[:even], b[:even]))


def test_fma_rounds_once():
    a, b = floats(), floats(seed=1)
    c = (-(a.astype(np.float64) * b)).astype(np.float32)  # what is left is a rounding error
    out = calculate("fma.rn.f32 %out, %in0, %in1, %in2;", "f32", ("f32", a), ("f32", b), ("f32", c))
    exact = a.astype(np.float64) * b + c
    assert_same(out, exact.astype(np.float32))
    finite = np.isfinite(exact)
    assert np.count_nonzero(out[finite]) > 100  # a * b rounded, then c added, would give zeros


@pytest.mark.parametrize("relu", ["", ".relu"])
def test_fma_of_half_types(relu):
    a, b, c = (floats(seed=s, dtype=np.float16) for s in (0, 1, 1))
    out = calculate(
        f"fma.rn{relu}.f16 %out, %in0, %in1, %in2;", "f16", ("f16", a), ("f16", b), ("f16", c)
    )
    exact = a.astype(np.float64) * b + c
    expected = (np.maximum(exact, 0) if relu else exact).astype(np.float16)
    np.testing.assert_array_equal(out, expected)
    (a, a_bits), (b, b_bits) = bf16(floats()), bf16(floats(seed=1))
    operands = ("bf16", a_bits), ("bf16", b_bits), ("bf16", b_bits)
    out = calculate(f"fma.rn{relu}.bf16 %out, %in0, %in1, %in2;", "bf16", *operands)
    exact = a.astype(np.float64) * b + b
    same_bf16(out, np.maximum(exact, 0) if relu else exact)


UNARY = {
    "neg.f32": np.negative,
    "abs.f32": np.abs,
    "sqrt.rn.f32": np.sqrt,
    "sqrt.approx.f32": np.sqrt,
    "rcp.rn.f32": lambda v: 1 / v,
    "rcp.approx.f32": lambda v: 1 / v,
    "rsqrt.approx.f32": lambda v: 1 / np.sqrt(v),
    "ex2.approx.f32": np.exp2,
    "lg2.approx.f32": np.log2,
    "sin.approx.f32": np.sin,
    "cos.approx.f32": np.cos,
    "tanh.approx.f32": np.tanh,
}


@pytest.mark.parametrize("code", UNARY)
def test_one_operand(code):
    """Within two roundings of the exact value."""
    a = floats()
    out = calculate(f"{code} %out, %in0;", "f32", ("f32", a))
    exact = UNARY[code](a.astype(np.float64))
    with np.errstate(all="ignore"):
        expected = exact.astype(np.float32)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))
    np.testing.assert_allclose(out, expected, rtol=2 * np.finfo(np.float32).eps, atol=0)


def test_flush_to_zero():
    tiny = np.float32([1e-39, -1e-39, 1e-20, 2e-38, 1.0])
    other = np.float32([1.0, 1.0, 1e-20, -1.5e-38, 1e-39])
    out = calculate("mul.ftz.f32 %out, %in0, %in1;", "f32", ("f32", tiny), ("f32", other))
    assert_same(out, np.float32([0.0, -0.0, 0.0, -0.0, 0.0]))
    kept = calculate("mul.f32 %out, %in0, %in1;", "f32", ("f32", tiny), ("f32", other))
    assert kept[0] != 0
    out = calculate("add.ftz.f32 %out, %in0, %in1;", "f32", ("f32", tiny), ("f32", other))
    assert out[3] == 0
    assert out[4] == 1


def test_saturation():
    a = np.float32([-1, 0.25, 2, np.nan, np.inf])
    out = calculate("add.sat.f32 %out, %in0, 0f00000000;", "f32", ("f32", a))
    assert_same(out, np.float32([0, 0.25, 1, 0, 1]))


def test_copysign_takes_the_sign_of_the_first():
    a, b = np.float32([1, -1, -0.0]), np.float32([-2, 2, 3])
    out = calculate("copysign.f32 %out, %in0, %in1;", "f32", ("f32", a), ("f32", b))
    assert_same(out, np.float32([2, -2, -3]))


@pytest.mark.parametrize("name", ["finite", "infinite", "number", "notanumber"])
def test_testp(name):
    a = floats()
    out = calculate(f"testp.{name}.f32 %out, %in0;", "pred", ("f32", a))
    tests = {
        "finite": math.isfinite,
        "infinite": math.isinf,
        "number": lambda v: not math.isnan(v),
        "notanumber": math.isnan,
    }
    np.testing.assert_array_equal(out, [tests[name](float(v)) for v in a])
