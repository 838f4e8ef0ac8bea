"""Integer arithmetic against Python's exact integers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_kernels import calculate, integers

from fusetune.sim.ptx.types import DTYPES


def wrapped(value, kind):
    """The lower bits of an exact integer, as the type reads them."""
    bits = 8 * DTYPES[kind].itemsize
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value


def expected(function, kind, *arrays):
    values = [wrapped(function(*(int(v) for v in row)), kind) for row in zip(*arrays, strict=True)]
    return np.array(values, DTYPES[kind])


def truncated(a, b):
    return abs(a) // abs(b) * (-1 if (a < 0) != (b < 0) else 1)


BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
}
KINDS = ["u16", "s16", "u32", "s32", "u64", "s64"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BINARY)
def test_two_operands(name, kind):
    a, b = integers(kind), integers(kind, seed=1)
    out = calculate(f"{name}.{kind} %out, %in0, %in1;", kind, (kind, a), (kind, b))
    np.testing.assert_array_equal(out, expected(BINARY[name], kind, a, b))


@pytest.mark.parametrize("kind", KINDS)
def test_mul_hi(kind):
    a, b = integers(kind), integers(kind, seed=1)
    bits = 8 * DTYPES[kind].itemsize
    out = calculate(f"mul.hi.{kind} %out, %in0, %in1;", kind, (kind, a), (kind, b))
    np.testing.assert_array_equal(out, expected(lambda x, y: x * y >> bits, kind, a, b))


@pytest.mark.parametrize(
    ("kind", "wide"), [("u16", "u32"), ("s16", "s32"), ("u32", "u64"), ("s32", "s64")]
)
def test_mul_wide(kind, wide):
    a, b = integers(kind), integers(kind, seed=1)
    out = calculate(f"mul.wide.{kind} %out, %in0, %in1;", wide, (kind, a), (kind, b))
    np.testing.assert_array_equal(out, expected(lambda x, y: x * y, wide, a, b))
    c = integers(wide, seed=2)[: len(a)]
    out = calculate(
        f"mad.wide.{kind} %out, %in0, %in1, %in2;", wide, (kind, a), (kind, b), (wide, c)
    )
    np.testing.assert_array_equal(out, expected(lambda x, y, z: x * y + z, wide, a, b, c))


@pytest.mark.parametrize("kind", KINDS)
def test_mad(kind):
    a, b, c = integers(kind), integers(kind, seed=1), integers(kind, seed=2)
    bits = 8 * DTYPES[kind].itemsize
    operands = (kind, a), (kind, b), (kind, c)
    low = calculate(f"mad.lo.{kind} %out, %in0, %in1, %in2;", kind, *operands)
    np.testing.assert_array_equal(low, expected(lambda x, y, z: x * y + z, kind, a, b, c))
    high = calculate(f"mad.hi.{kind} %out, %in0, %in1, %in2;", kind, *operands)
    np.testing.assert_array_equal(
        high, expected(lambda x, y, z: (x * y >> bits) + z, kind, a, b, c)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_div_and_rem_truncate(kind):
    a, b = integers(kind), integers(kind, seed=1)
    a, b = a[b != 0], b[b != 0]
    quotient = calculate(f"div.{kind} %out, %in0, %in1;", kind, (kind, a), (kind, b))
    np.testing.assert_array_equal(quotient, expected(truncated, kind, a, b))
    remainder = calculate(f"rem.{kind} %out, %in0, %in1;", kind, (kind, a), (kind, b))
    np.testing.assert_array_equal(
        remainder, expected(lambda x, y: x - y * truncated(x, y), kind, a, b)
    )


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_neg_and_abs(kind):
    a = integers(kind)
    np.testing.assert_array_equal(
        calculate(f"neg.{kind} %out, %in0;", kind, (kind, a)), expected(lambda x: -x, kind, a)
    )
    np.testing.assert_array_equal(
        calculate(f"abs.{kind} %out, %in0;", kind, (kind, a)), expected(abs, kind, a)
    )


def test_sad():
    a, b, c = integers("s32"), integers("s32", seed=1), integers("s32", seed=2)
    out = calculate("sad.s32 %out, %in0, %in1, %in2;", "s32", ("s32", a), ("s32", b), ("s32", c))
    np.testing.assert_array_equal(out, expected(lambda x, y, z: abs(x - y) + z, "s32", a, b, c))


LONG = st.integers(0, (1 << 64) - 1)


@given(st.lists(st.tuples(LONG, LONG), min_size=1, max_size=40))
@settings(max_examples=25, deadline=None)
def test_carries_chain_to_128_bits(pairs):
    a, b = (np.array(side, np.uint64) for side in zip(*pairs, strict=True))
    halves = """
    .reg .b32 %a<2>, %b<2>, %s<2>;
    mov.b64 {%a0, %a1}, %in0; mov.b64 {%b0, %b1}, %in1;
    """
    total = calculate(
        f"{{ {halves} add.cc.u32 %s0, %a0, %b0; addc.u32 %s1, %a1, %b1;"
        "mov.b64 %out, {%s0, %s1}; }",
        "u64", ("u64", a), ("u64", b),
    )  # fmt: skip
    np.testing.assert_array_equal(total, a + b)
    difference = calculate(
        f"{{ {halves} sub.cc.u32 %s0, %a0, %b0; subc.u32 %s1, %a1, %b1;"
        "mov.b64 %out, {%s0, %s1}; }",
        "u64", ("u64", a), ("u64", b),
    )  # fmt: skip
    np.testing.assert_array_equal(difference, a - b)
    product = calculate(
        f"""{{ {halves} .reg .b32 %t<2>;
        mul.lo.u32 %s0, %a0, %b0; mul.hi.u32 %s1, %a0, %b0;
        mad.lo.cc.u32 %s1, %a0, %b1, %s1; madc.hi.u32 %t0, %a0, %b1, 0;
        mad.lo.cc.u32 %s1, %a1, %b0, %s1; madc.hi.u32 %t1, %a1, %b0, %t0;
        mov.b64 %out, {{%s0, %s1}}; }}""",
        "u64", ("u64", a), ("u64", b),
    )  # fmt: skip
    np.testing.assert_array_equal(product, a * b)


@given(st.lists(st.tuples(LONG, LONG), min_size=1, max_size=40))
@settings(max_examples=25, deadline=None)
def test_mul_hi_of_64_bits(pairs):
    a, b = (np.array(side, np.uint64) for side in zip(*pairs, strict=True))
    unsigned = calculate("mul.hi.u64 %out, %in0, %in1;", "u64", ("u64", a), ("u64", b))
    np.testing.assert_array_equal(unsigned, expected(lambda x, y: x * y >> 64, "u64", a, b))
    a, b = a.view(np.int64), b.view(np.int64)
    signed = calculate("mul.hi.s64 %out, %in0, %in1;", "s64", ("s64", a), ("s64", b))
    np.testing.assert_array_equal(signed, expected(lambda x, y: x * y >> 64, "s64", a, b))
