"""cvt, setp, selp, mov: numbers become others, or go elsewhere."""

import numpy as np
import pytest
import torch
from ptx_kernels import assert_same, calculate, floats, integers

from fusetune.sim.ptx.types import DTYPES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
INTEGERS = ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"]


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", INTEGERS)
def test_integer_to_integer(source, target):
    value = integers(source)
    out = calculate(f"cvt.{target}.{source} %out, %in0;", target, (source, value))
    np.testing.assert_array_equal(out, value.astype(DTYPES[target]))


def test_saturating_integer():
    value = integers("s32")
    out = calculate("cvt.sat.s16.s32 %out, %in0;", "s16", ("s32", value))
    np.testing.assert_array_equal(out, value.clip(-(2**15), 2**15 - 1))
    out = calculate("cvt.sat.u16.s32 %out, %in0;", "u16", ("s32", value))
    np.testing.assert_array_equal(out, value.clip(0, 2**16 - 1))


@pytest.mark.parametrize("source", ["f16", "f32", "f64"])
@pytest.mark.parametrize("target", ["s8", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize(
    ("rounding", "function"),
    [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)],
)
def test_float_to_integer_clamps(source, target, rounding, function):
    value = floats(dtype=DTYPES[source].type)
    out = calculate(f"cvt.{rounding}.{target}.{source} %out, %in0;", target, (source, value))
    info = np.iinfo(DTYPES[target])
    expected = []
    for number in function(value.astype(np.float64)):
        if np.isnan(number):
            expected.append(0)
        elif np.isinf(number):
            expected.append(info.max if number > 0 else info.min)
        else:
            expected.append(min(max(int(number), info.min), info.max))
    np.testing.assert_array_equal(out, np.array(expected, DTYPES[target]))


@pytest.mark.parametrize("source", ["u8", "s16", "u32", "s32", "s64", "u64", "f16", "f64"])
def test_to_f32(source):
    value = floats(dtype=DTYPES[source].type) if source[0] == "f" else integers(source)
    rounding = "" if source == "f16" else ".rn"
    out = calculate(f"cvt{rounding}.f32.{source} %out, %in0;", "f32", (source, value))
    assert_same(out, value.astype(np.float32))


def test_f32_to_narrower_types():
    value = floats(2000)
    assert_same(calculate("cvt.rn.f16.f32 %out, %in0;", "f16", ("f32", value)), value.astype("f2"))
    bits = calculate("cvt.rn.bf16.f32 %out, %in0;", "bf16", ("f32", value))
    expected = torch.from_numpy(value).bfloat16()
    got = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    np.testing.assert_array_equal(got.float().numpy(), expected.float().numpy())
    truncated = calculate("cvt.rz.bf16.f32 %out, %in0;", "bf16", ("f32", value))
    number = ~np.isnan(value)
    np.testing.assert_array_equal(truncated[number], (value.view(np.uint32) >> 16)[number])


def test_ties_of_bf16_go_to_even():
    bits = np.uint32([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F817FFF, 0x3F808001, 0xBF818000])
    out = calculate("cvt.rn.bf16.f32 %out, %in0;", "bf16", ("f32", bits.view(np.float32)))
    np.testing.assert_array_equal(out, [0x3F80, 0x3F82, 0x3F80, 0x3F81, 0x3F81, 0xBF82])


def test_bf16_to_f32():
    value = torch.from_numpy(floats()).bfloat16()
    bits = value.view(torch.int16).numpy().view(np.uint16)
    out = calculate("cvt.f32.bf16 %out, %in0;", "f32", ("bf16", bits))
    np.testing.assert_array_equal(out, value.float().numpy())


def test_relu_and_saturation():
    value = np.float32([-2, -0.5, 0.25, 3, np.inf])
    out = calculate("cvt.rn.relu.f16.f32 %out, %in0;", "f16", ("f32", value))
    assert_same(out, np.float16([0, 0, 0.25, 3, np.inf]))
    out = calculate("cvt.sat.f32.f32 %out, %in0;", "f32", ("f32", value))
    assert_same(out, np.float32([0, 0, 0.25, 1, 1]))


def test_rounding_to_integral_floats():
    value = np.float32([-2.5, -0.5, 0.5, 1.5, 2.5, 2.7])
    for rounding, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor)):
        out = calculate(f"cvt.{rounding}.f32.f32 %out, %in0;", "f32", ("f32", value))
        assert_same(out, function(value))


@pytest.mark.parametrize("relu", ["", ".relu"])
@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_pairs_have_the_first_operand_on_top(kind, relu):
    high, low = floats(), floats(seed=1)
    code = f"cvt.rn{relu}.{kind}.f32 %out, %in0, %in1;"
    out = calculate(code, kind, ("f32", high), ("f32", low))
    dtype = torch.float16 if kind == "f16x2" else torch.bfloat16
    halves = torch.from_numpy(out.view(np.int16).reshape(-1, 2)).view(dtype).float().numpy()
    for column, value in ((1, high), (0, low)):
        expected = torch.from_numpy(value).to(dtype)
        expected = torch.relu(expected) if relu else expected
        np.testing.assert_array_equal(halves[:, column], expected.float().numpy())


@pytest.mark.parametrize(
    ("kind", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]
)
def test_all_numbers_of_fp8(kind, dtype):
    codes = np.arange(1 << 16).astype(np.uint16)
    out = calculate(f"cvt.rn.f16x2.{kind}x2 %out, %in0;", "f16x2", (f"{kind}x2", codes))
    expected = torch.from_numpy(codes.view(np.uint8)).view(dtype).to(torch.float16).numpy()
    assert_same(out.view(np.float16), expected)


def test_tf32_ties_away_from_zero():
    value = np.uint32([0x3F801000, 0x3F800FFF, 0x3F803000, 0xBF801000]).view(np.float32)
    out = calculate("cvt.rna.tf32.f32 %out, %in0;", "tf32", ("f32", value))
    np.testing.assert_array_equal(out, np.uint32([0x3F802000, 0x3F800000, 0x3F804000, 0xBF802000]))


ORDER = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", ORDER)
def test_comparing_integers(name, kind):
    a, b = integers(kind), integers(kind, seed=1)
    out = calculate(f"setp.{name}.{kind} %out, %in0, %in1;", "pred", (kind, a), (kind, b))
    np.testing.assert_array_equal(out, ORDER[name](a, b))


def test_unsigned_names_of_order():
    a, b = integers("u32"), integers("u32", seed=1)
    for name, function in (("lo", np.less), ("ls", np.less_equal), ("hi", np.greater)):
        out = calculate(f"setp.{name}.u32 %out, %in0, %in1;", "pred", ("u32", a), ("u32", b))
        np.testing.assert_array_equal(out, function(a, b))


@pytest.mark.parametrize("name", ORDER)
@pytest.mark.parametrize("kind", ["f16", "f32", "f64"])
def test_comparing_floats_with_nans(name, kind):
    a, b = floats(dtype=DTYPES[kind].type), floats(seed=1, dtype=DTYPES[kind].type)
    unordered = np.isnan(a) | np.isnan(b)
    operands = (kind, a), (kind, b)
    ordered = calculate(f"setp.{name}.{kind} %out, %in0, %in1;", "pred", *operands)
    np.testing.assert_array_equal(ordered, ORDER[name](a, b) & ~unordered)
    either = calculate(f"setp.{name}u.{kind} %out, %in0, %in1;", "pred", *operands)
    np.testing.assert_array_equal(either, ORDER[name](a, b) | unordered)
    out = calculate(f"setp.nan.{kind} %out, %in0, %in1;", "pred", *operands)
    np.testing.assert_array_equal(out, unordered)
    out = calculate(f"setp.num.{kind} %out, %in0, %in1;", "pred", *operands)
    np.testing.assert_array_equal(out, ~unordered)


@pytest.mark.parametrize(
    ("name", "function"),
    [("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)],
)
def test_comparison_and_its_opposite_combined(name, function):
    a, b = integers("s32"), integers("s32", seed=1)
    other = np.arange(len(a)) % 2
    operands = ("s32", a), ("s32", b), ("pred", other)
    code = f"setp.lt.{name}.s32 %out|%q5, %in0, %in1, %in2;"
    np.testing.assert_array_equal(calculate(code, "pred", *operands), function(a < b, other))
    code = f"setp.lt.{name}.s32 %q5|%out, %in0, %in1, %in2;"
    np.testing.assert_array_equal(calculate(code, "pred", *operands), function(a >= b, other))
    code = f"setp.lt.{name}.s32 %out, %in0, %in1, !%in2;"
    np.testing.assert_array_equal(calculate(code, "pred", *operands), function(a < b, 1 - other))


def test_selp():
    a, b, chosen = integers("s32"), integers("s32", seed=1), np.arange(400 + 169) % 3 == 0
    chosen = np.resize(chosen, len(a))
    out = calculate(
        "selp.s32 %out, %in0, %in1, %in2;", "s32", ("s32", a), ("s32", b), ("pred", chosen)
    )
    np.testing.assert_array_equal(out, np.where(chosen, a, b))


def test_mov_packs_the_first_into_the_lowest_bits():
    low, high = integers("u32"), integers("u32", seed=1)
    out = calculate("mov.b64 %out, {%in0, %in1};", "u64", ("u32", low), ("u32", high))
    np.testing.assert_array_equal(out, low.astype(np.uint64) | high.astype(np.uint64) << 32)
    for part, expected in (("{%out, %r9}", low), ("{%r9, %out}", high), ("{_, %out}", high)):
        again = calculate(f"mov.b64 {part}, %in0;", "u32", ("u64", out))
        np.testing.assert_array_equal(again, expected)


def test_immediates():
    zero = ("u32", np.zeros(3, np.uint32))
    for text, expected in (
        ("0f3FC00000", np.float32(1.5).view(np.uint32)),
        ("-1", 0xFFFFFFFF),
        ("0x10", 16),
        ("4294967295", 0xFFFFFFFF),
    ):
        out = calculate(f"mov.b32 %out, {text};", "u32", zero)
        np.testing.assert_array_equal(out, [expected] * 3)
    out = calculate("mov.f64 %out, 0d3FF8000000000000;", "f64", zero)
    np.testing.assert_array_equal(out, [1.5] * 3)
