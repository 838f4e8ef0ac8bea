"""Logic, shifts and bit fields against Python's integers."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ptx_kernels import calculate, integers

from fusetune.sim.ptx.types import DTYPES

WORD = st.integers(0, (1 << 32) - 1)
AMOUNT = st.integers(0, 80)


def words(rows, *kinds):
    return [
        (kind, np.array(column, DTYPES[kind]))
        for kind, column in zip(kinds, zip(*rows, strict=True), strict=True)
    ]


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_logic(kind):
    a, b = integers(f"u{kind[1:]}"), integers(f"u{kind[1:]}", seed=1)
    for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        out = calculate(f"{name}.{kind} %out, %in0, %in1;", kind, (kind, a), (kind, b))
        np.testing.assert_array_equal(out, function(a, b))
    np.testing.assert_array_equal(calculate(f"not.{kind} %out, %in0;", kind, (kind, a)), ~a)
    np.testing.assert_array_equal(calculate(f"cnot.{kind} %out, %in0;", kind, (kind, a)), a == 0)


def test_logic_of_predicates():
    a, b = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    for name, truth in (("and", [0, 0, 0, 1]), ("or", [0, 1, 1, 1]), ("xor", [0, 1, 1, 0])):
        out = calculate(f"{name}.pred %out, %in0, %in1;", "pred", ("pred", a), ("pred", b))
        np.testing.assert_array_equal(out, np.array(truth, bool))
    np.testing.assert_array_equal(calculate("not.pred %out, %in0;", "pred", ("pred", a)), a == 0)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_shifts_of_the_width_and_more(kind):
    value = integers(kind, 100)
    bits = 8 * DTYPES[kind].itemsize
    amount = np.arange(len(value), dtype=np.uint32) % (bits + 20)
    out = calculate(f"shr.{kind} %out, %in0, %in1;", kind, (kind, value), ("u32", amount))
    np.testing.assert_array_equal(
        out, [int(v) >> int(a) for v, a in zip(value, amount, strict=True)]
    )
    left = calculate(f"shl.b{bits} %out, %in0, %in1;", kind, (kind, value), ("u32", amount))
    expected = [(int(v) << int(a)) & ((1 << bits) - 1) for v, a in zip(value, amount, strict=True)]
    np.testing.assert_array_equal(left.view(f"u{bits // 8}"), np.array(expected, f"u{bits // 8}"))


@given(st.lists(st.tuples(WORD, WORD, AMOUNT), min_size=1, max_size=40))
@settings(max_examples=20, deadline=None)
def test_funnel_shift(rows):
    operands = words(rows, "u32", "u32", "u32")
    for mode, limit in (("wrap", lambda s: s & 31), ("clamp", lambda s: min(s, 32))):
        left = calculate(f"shf.l.{mode}.b32 %out, %in0, %in1, %in2;", "u32", *operands)
        right = calculate(f"shf.r.{mode}.b32 %out, %in0, %in1, %in2;", "u32", *operands)
        both = [(b << 32 | a, limit(s)) for a, b, s in rows]
        np.testing.assert_array_equal(left, [(v << s >> 32) & 0xFFFFFFFF for v, s in both])
        np.testing.assert_array_equal(right, [(v >> s) & 0xFFFFFFFF for v, s in both])


def field(value, at, length, bits, signed):
    """bfe as the manual's pseudocode has it, bit by bit."""
    top = min(at + length - 1, bits - 1)
    sign = value >> top & 1 if signed and length else 0
    result = 0
    for i in range(bits):
        inside = i < length and at + i < bits
        result |= (value >> (at + i) & 1 if inside else sign) << i
    return result


EDGES = (0, 1, 24, 31, 32, 33, 40, 63, 64, 80, 255)


@given(st.lists(st.tuples(st.integers(0, (1 << 64) - 1), AMOUNT, AMOUNT), min_size=1, max_size=40))
@example([(0x8765432187654321, at, length) for at in EDGES for length in EDGES])
@settings(max_examples=20, deadline=None)
def test_bfe(rows):
    for kind in ("u32", "s32", "u64", "s64"):
        bits = int(kind[1:])
        cut = [(value & ((1 << bits) - 1), at, length) for value, at, length in rows]
        operands = words(cut, f"u{bits}", "u32", "u32")
        out = calculate(f"bfe.{kind} %out, %in0, %in1, %in2;", f"u{bits}", *operands)
        expected = [field(*row, bits, kind[0] == "s") for row in cut]
        np.testing.assert_array_equal(out, np.array(expected, f"u{bits // 8}"))


@given(st.lists(st.tuples(WORD, WORD, AMOUNT, AMOUNT), min_size=1, max_size=40))
@example([(0x87654321, 0x12345678, at, length) for at in EDGES for length in EDGES])
@settings(max_examples=20, deadline=None)
def test_bfi(rows):
    operands = words(rows, "u32", "u32", "u32", "u32")
    out = calculate("bfi.b32 %out, %in0, %in1, %in2, %in3;", "u32", *operands)
    expected = []
    for a, b, at, length in rows:
        for i in range(length):
            if at + i < 32:
                b = b & ~(1 << (at + i)) | (a >> i & 1) << (at + i)
        expected.append(b)
    np.testing.assert_array_equal(out, expected)


@given(st.lists(st.tuples(WORD, WORD, WORD), min_size=1, max_size=20), st.integers(0, 255))
@settings(max_examples=30, deadline=None)
def test_lop3_is_a_table_of_bits(rows, table):
    out = calculate(f"lop3.b32 %out, %in0, %in1, %in2, {table};", "u32", *words(rows, *["u32"] * 3))
    expected = [
        sum(
            (table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i
            for i in range(32)
        )
        for a, b, c in rows
    ]
    np.testing.assert_array_equal(out, expected)


@given(st.lists(st.tuples(WORD, WORD, WORD), min_size=1, max_size=20), st.integers(0, 0xFFFF))
@settings(max_examples=30, deadline=None)
def test_prmt(rows, constant):
    def permuted(a, b, selector):
        source = list(a.to_bytes(4, "little") + b.to_bytes(4, "little"))
        picked = []
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = source[nibble & 7]
            picked.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
        return int.from_bytes(bytes(picked), "little")

    operands = words(rows, "u32", "u32", "u32")
    out = calculate("prmt.b32 %out, %in0, %in1, %in2;", "u32", *operands)
    np.testing.assert_array_equal(out, [permuted(*row) for row in rows])
    out = calculate(f"prmt.b32 %out, %in0, %in1, {constant:#x}U;", "u32", *operands[:2])
    np.testing.assert_array_equal(out, [permuted(a, b, constant) for a, b, _ in rows])


@pytest.mark.parametrize("bits", [32, 64])
def test_counting(bits):
    value = integers(f"u{bits}")
    texts = [f"{int(v):0{bits}b}" for v in value]
    operand = (f"b{bits}", value)
    np.testing.assert_array_equal(
        calculate(f"popc.b{bits} %out, %in0;", "u32", operand), [t.count("1") for t in texts]
    )
    np.testing.assert_array_equal(
        calculate(f"clz.b{bits} %out, %in0;", "u32", operand),
        [(t + "1").index("1") for t in texts],
    )
    np.testing.assert_array_equal(
        calculate(f"brev.b{bits} %out, %in0;", f"u{bits}", operand),
        np.array([int(t[::-1], 2) for t in texts], f"u{bits // 8}"),
    )
    found = calculate(f"bfind.u{bits} %out, %in0;", "u32", operand)
    expected = [int(v).bit_length() - 1 & 0xFFFFFFFF for v in value]
    np.testing.assert_array_equal(found, np.array(expected, np.uint32))


def test_bfind_of_signed_numbers():
    value = integers("s32")
    found = calculate("bfind.s32 %out, %in0;", "u32", ("s32", value))
    expected = [(int(v) if v >= 0 else ~int(v)).bit_length() - 1 & 0xFFFFFFFF for v in value]
    np.testing.assert_array_equal(found, np.array(expected, np.uint32))
    shift = calculate("bfind.shiftamt.s32 %out, %in0;", "u32", ("s32", value))
    amounts = [e if e == 0xFFFFFFFF else 31 - e for e in expected]
    np.testing.assert_array_equal(shift, np.array(amounts, np.uint32))
