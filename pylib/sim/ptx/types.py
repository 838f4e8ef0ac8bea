"""PTX types as numpy sees them, and the conversions numpy lacks.

A value of a register is an array with one element per thread, or a numpy scalar where all threads
have the same. bfloat16, tf32, fp8 and packed pairs travel as bits in unsigned integers.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
DType: TypeAlias = np.dtype[Any]
Value: TypeAlias = Any  # an Array, or a numpy scalar

INTEGERS: dict[str, DType] = {
    **{f"u{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    **{f"s{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
}
BITS: dict[str, DType] = {f"b{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)}
FLOATS: dict[str, DType] = {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8")}
ENCODED: dict[str, DType] = {
    "bf16": np.dtype("u2"),
    "tf32": np.dtype("u4"),
    "f16x2": np.dtype("u4"),
    "bf16x2": np.dtype("u4"),
    "f32x2": np.dtype("u8"),
    "e4m3": np.dtype("u1"),
    "e5m2": np.dtype("u1"),
    "e4m3x2": np.dtype("u2"),
    "e5m2x2": np.dtype("u2"),
}
DTYPES: dict[str, DType] = {**INTEGERS, **BITS, **FLOATS, **ENCODED, "pred": np.dtype(np.bool_)}
UNSIGNED: dict[int, DType] = {n: np.dtype(f"u{n}") for n in (1, 2, 4, 8)}
SIGNED: dict[int, DType] = {n: np.dtype(f"i{n}") for n in (1, 2, 4, 8)}

FLOAT_TYPES = frozenset({*FLOATS, "bf16", "tf32"})  # one number
PAIR_TYPES = frozenset({"f16x2", "bf16x2", "f32x2"})  # two numbers


def is_signed(name: str) -> bool:
    return name in INTEGERS and name[0] == "s"


def raw(name: str) -> DType:
    """The unsigned dtype with a type's bits."""
    return DTYPES[name] if name == "pred" else UNSIGNED[DTYPES[name].itemsize]


def bf16_to_f32(bits: Value) -> Value:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(value: Value) -> Value:
    """To nearest, ties to even; NaNs become the canonical one."""
    bits = np.asarray(value, np.float32).view(np.uint32)
    rounding = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    rounded = ((bits + rounding) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def f32_to_tf32(value: Value) -> Value:
    """To nearest, ties away from zero (cvt.rna); as bits."""
    bits = np.asarray(value, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(value), rounded, bits)


def tf32_to_f32(bits: Value) -> Value:
    """What a tensor core sees: the lower 13 bits are ignored."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


@cache
def fp8_values(name: str) -> NDArray[np.float32]:
    """The 256 numbers of e4m3 (no infinities) or e5m2."""
    exponent_bits, mantissa_bits = (4, 3) if name == "e4m3" else (5, 2)
    code = np.arange(256)
    sign = np.where(code & 128, -1.0, 1.0)
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    fraction = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    bias = (1 << (exponent_bits - 1)) - 1
    normal = (1 + fraction) * np.exp2(exponent - bias, dtype=np.float64)
    value = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), normal)
    if name == "e4m3":
        value = np.where(code & 127 == 127, np.nan, value)
    else:
        top = exponent == 31
        value = np.where(top, np.where(fraction == 0, np.inf, np.nan), value)
    return (sign * value).astype(np.float32)


def flush(value: Value) -> Value:
    """.ftz: subnormals become zeros of their sign."""
    tiny = np.abs(value) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), value), value)


def literal(text: str, name: str) -> Value:
    """An immediate operand as a scalar of the type's dtype."""
    dtype = DTYPES[name]
    text = text.strip()
    if text[:2] in ("0f", "0F"):
        number = np.uint32(int(text[2:], 16)).view(np.float32)
        return number if dtype.itemsize == 4 else dtype.type(number)
    if text[:2] in ("0d", "0D"):
        double = np.uint64(int(text[2:], 16)).view(np.float64)
        return double if dtype.itemsize == 8 else dtype.type(double)
    try:
        integer = int(text.rstrip("U"), 0)
    except ValueError:
        return dtype.type(float(text))
    if name == "pred":
        return np.bool_(integer != 0)
    if name in FLOATS and "x" not in text.lower():
        return dtype.type(integer)
    size = dtype.itemsize
    return UNSIGNED[size].type(integer & ((1 << (8 * size)) - 1)).view(dtype)
