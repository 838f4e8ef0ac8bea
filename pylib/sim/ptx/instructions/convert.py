"""cvt: between all numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fusetune.sim.errors import UnknownInstruction
from fusetune.sim.ptx.instructions.registry import instruction
from fusetune.sim.ptx.operation import Operation
from fusetune.sim.ptx.threads import Step
from fusetune.sim.ptx.types import (
    DTYPES,
    FLOATS,
    INTEGERS,
    Value,
    bf16_to_f32,
    f32_to_bf16,
    f32_to_tf32,
    flush,
    fp8_values,
)

_TO_INTEGER: dict[str, Callable[..., Any]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}
_FLOATS = {*FLOATS, "bf16"}
_NUMBERS = {*_FLOATS, *INTEGERS}


@instruction("cvt")
def cvt(x: Operation) -> Step:
    source = x.modifiers.last_type({*_NUMBERS, "e4m3x2", "e5m2x2", "f16x2"})
    target = x.modifiers.last_type({*_NUMBERS, "tf32", "f16x2", "bf16x2", "e4m3x2", "e5m2x2"})
    if target in ("f16x2", "bf16x2"):
        if source == "f32":
            return _pack_pair(x, target)
        if source in ("e4m3x2", "e5m2x2") and target == "f16x2":
            return _from_fp8(x, source)
    if target == "tf32" and source == "f32":
        return _to_tf32(x)
    if source not in _NUMBERS or target not in _NUMBERS:
        raise UnknownInstruction(f"conversion of .{source} to .{target}")
    read = _number_reader(x, x.operands(2)[1], source)
    write = x.write(x.operands(2)[0], target)
    if source in INTEGERS:
        if target in INTEGERS:
            return _integer_to_integer(x, source, target, read, write)
        return _to_float(x, source, target, read, write)
    if target in INTEGERS:
        return _float_to_integer(x, target, read, write)
    return _to_float(x, source, target, read, write)


def _number_reader(x: Operation, operand: str, kind: str) -> Callable[[], Value]:
    read = x.read(operand, kind)
    return (lambda: bf16_to_f32(read())) if kind == "bf16" else read


def _integer_to_integer(x: Operation, source: str, target: str, read: Any, write: Any) -> Step:
    dtype = DTYPES[target]
    if not x.modifiers.flag("sat"):
        return lambda: write(read().astype(dtype))
    limits, given = np.iinfo(dtype), np.iinfo(DTYPES[source])
    low, high = max(limits.min, given.min), min(limits.max, given.max)
    return lambda: write(np.clip(read(), low, high).astype(dtype))


def _float_to_integer(x: Operation, target: str, read: Any, write: Any) -> Step:
    """Out of range: the nearest integer there is; NaN: 0."""
    function = _TO_INTEGER[x.modifiers.required(*_TO_INTEGER)]
    flushing = x.modifiers.flag("ftz")
    x.modifiers.ignore("sat")
    dtype = DTYPES[target]
    limits = np.iinfo(dtype)

    def step() -> None:
        value = read()
        if flushing and value.dtype == np.float32:
            value = flush(value)
        value = function(value.astype(np.float64))
        too_high, too_low = value >= float(limits.max), value <= float(limits.min)
        inside = np.where(too_high | too_low | np.isnan(value), 0.0, value)
        result = inside.astype(dtype)
        result = np.where(too_high, dtype.type(limits.max), result)
        write(np.where(too_low, dtype.type(limits.min), result))

    return step


def _to_float(x: Operation, source: str, target: str, read: Any, write: Any) -> Step:
    rounding = x.modifiers.one_of("rn", "rz", *_TO_INTEGER)
    flushing = x.modifiers.flag("ftz")
    saturating = x.modifiers.flag("sat")
    relu = x.modifiers.flag("relu")
    if rounding == "rz" and target != "bf16":
        raise UnknownInstruction(f"rounding .rz to .{target}")
    integral = _TO_INTEGER.get(rounding or "")
    if target == "bf16":
        if source in INTEGERS and DTYPES[source].itemsize > 2:
            raise UnknownInstruction("bf16 of a wide integer")  # would be rounded twice
        if source == "f64":
            raise UnknownInstruction("bf16 of f64")
        convert = _truncate_to_bf16 if rounding == "rz" else f32_to_bf16
    else:
        dtype = DTYPES[target]

        def convert(value: Value) -> Value:
            return value if value.dtype == dtype else value.astype(dtype)

    def step() -> None:
        value = read()
        if flushing and value.dtype == np.float32:
            value = flush(value)
        if integral is not None:
            value = integral(value)
        if relu:
            value = np.where(value > 0, value, np.where(np.isnan(value), value, 0 * value))
            value = np.where(np.signbit(value), -value, value)
        if saturating:
            value = np.clip(np.nan_to_num(value, nan=0.0), 0, 1)
        if target == "bf16" and value.dtype != np.float32:
            value = value.astype(np.float32)
        result = convert(value)
        write(flush(result) if flushing and target == "f32" else result)

    return step


def _truncate_to_bf16(value: Value) -> Value:
    bits = np.asarray(value, np.float32).view(np.uint32)
    return np.where(np.isnan(value), np.uint16(0x7FFF), (bits >> 16).astype(np.uint16))


def _pack_pair(x: Operation, target: str) -> Step:
    """cvt.rn.bf16x2.f32 d, a, b: a in the upper half, b in the lower one."""
    rounding = x.modifiers.required("rn", "rz")
    relu = x.modifiers.flag("relu")
    if rounding == "rz" and target == "f16x2":
        raise UnknownInstruction("rounding .rz to .f16x2")
    destination, high, low = x.operands(3)
    read_high, read_low = x.read(high, "f32"), x.read(low, "f32")
    write, m = x.write(destination, target), x.machine
    convert: Callable[[Value], Value] = f32_to_bf16
    if target == "f16x2":
        convert = _to_f16_bits
    elif rounding == "rz":
        convert = _truncate_to_bf16

    def step() -> None:
        pair = np.empty((m.lanes, 2), np.float32)
        pair[:, 0], pair[:, 1] = read_low(), read_high()
        if relu:
            pair = np.where(pair > 0, pair, np.where(np.isnan(pair), pair, np.float32(0)))
        write(np.ascontiguousarray(convert(pair)).view(np.uint32)[:, 0])

    return step


def _to_f16_bits(value: Value) -> Value:
    return value.astype(np.float16)


def _from_fp8(x: Operation, source: str) -> Step:
    x.modifiers.required("rn")
    relu = x.modifiers.flag("relu")
    destination, operand = x.operands(2)
    read, write, m = x.read(operand, source), x.write(destination, "f16x2"), x.machine
    values = fp8_values(source[:-2]).astype(np.float16)

    def step() -> None:
        pair = values[m.spread(read()).view(np.uint8).reshape(m.lanes, 2)]
        if relu:
            pair = np.maximum(pair, np.float16(0))
        write(np.ascontiguousarray(pair).view(np.uint32)[:, 0])

    return step


def _to_tf32(x: Operation) -> Step:
    x.modifiers.required("rna")
    destination, operand = x.operands(2)
    read, write = x.read(operand, "f32"), x.write(destination, "tf32")
    return lambda: write(f32_to_tf32(read()))
