"""Floating-point arithmetic, also of bf16 and of packed pairs.

Approximate instructions (ex2, rcp.approx, ...) give the rounded exact value. The product of an fma
is exact and its sum is rounded twice, to float64 and to the type: within 2^-29 of an ulp of right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fusetune.sim.ptx.instructions.registry import instruction
from fusetune.sim.ptx.machine import Machine
from fusetune.sim.ptx.operation import Operation, Read, Write
from fusetune.sim.ptx.threads import Step
from fusetune.sim.ptx.types import bf16_to_f32, f32_to_bf16, flush

_TYPES = frozenset({"f16", "bf16", "f16x2", "bf16x2", "f32", "f32x2", "f64"})


def read_numbers(x: Operation, operand: str, kind: str) -> Read:
    """A closure that gives numbers to calculate with: pairs as [threads, 2], bf16 as float32."""
    read = x.read(operand, kind)
    m = x.machine
    if kind == "bf16":
        return lambda: bf16_to_f32(read())
    if kind == "bf16x2":
        return lambda: bf16_to_f32(_halves(m, read(), np.uint16))
    if kind == "f16x2":
        return lambda: _halves(m, read(), np.float16)
    if kind == "f32x2":
        return lambda: _halves(m, read(), np.float32)
    return read


def _halves(m: Machine, value: Any, dtype: Any) -> Any:
    return m.spread(value).view(dtype).reshape(m.lanes, 2)


def write_numbers(x: Operation, operand: str, kind: str) -> Write:
    """A closure that rounds numbers to the type and writes them."""
    write = x.write(operand, kind)
    if kind == "bf16":
        return lambda value: write(f32_to_bf16(value))
    if kind == "bf16x2":
        return lambda value: write(np.ascontiguousarray(f32_to_bf16(value)).view(np.uint32)[:, 0])
    if kind == "f16x2":
        return lambda value: write(_packed(value, np.float16).view(np.uint32)[:, 0])
    if kind == "f32x2":
        return lambda value: write(_packed(value, np.float32).view(np.uint64)[:, 0])
    dtype = {"f16": np.float16, "f32": np.float32, "f64": np.float64}[kind]
    return lambda value: write(value if value.dtype == dtype else value.astype(dtype))


def _packed(value: Any, dtype: Any) -> Any:
    return np.ascontiguousarray(value, dtype)


_BINARY: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": np.fmin,
    "max": np.fmax,
}
_UNARY: dict[str, Callable[..., Any]] = {
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "rsqrt": lambda v: v.dtype.type(1) / np.sqrt(v),
    "rcp": lambda v: v.dtype.type(1) / v,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}
_APPROXIMATE = {"sqrt", "rsqrt", "rcp", "ex2", "lg2", "sin", "cos", "tanh"}


def arithmetic(x: Operation) -> Step:
    """add, sub, mul, div, min, max, fma, mad, neg, abs and the special functions."""
    kind = x.modifiers.last_type(_TYPES)
    name = x.mnemonic
    # add.f32.bf16 d, a, c: a is bf16, the rest float32
    narrow = None
    if name in ("add", "sub", "fma") and kind in ("f16", "bf16") and x.modifiers.flag("f32"):
        narrow, kind = kind, "f32"
    x.modifiers.ignore("rn")  # other roundings remain, and raise
    flushing = kind == "f32" and x.modifiers.flag("ftz")
    saturating = x.modifiers.flag("sat")
    if name in ("fma", "mad"):
        function = _fma(kind, relu=x.modifiers.flag("relu"))
        operands = x.operands(4)
    elif name in _BINARY:
        function = _BINARY[name]
        if name in ("min", "max"):
            if x.modifiers.flag("NaN"):
                function = np.minimum if name == "min" else np.maximum
            operands = x.operands(3, 4)
        else:
            operands = x.operands(3)
        if name == "div":
            x.modifiers.ignore("approx", "full")
    else:
        function = _UNARY[name]
        if name in _APPROXIMATE:
            x.modifiers.ignore("approx")
        operands = x.operands(2)
    target, *sources = operands
    narrowed = sources if name == "fma" else sources[:1]  # the last addend is never narrow
    if name == "fma":
        narrowed = sources[:2]
    reads = [
        read_numbers(x, source, narrow if narrow and source in narrowed else kind)
        for source in sources
    ]
    if narrow:
        reads = [_as_f32(read) for read in reads]
    if flushing:
        reads = [_flushed(read) for read in reads]
    write = write_numbers(x, target, kind)
    if flushing:
        write = _flush_then(write)
    if saturating:
        write = _saturate_then(write)
    return _step(function, reads, write)


def _step(function: Callable[..., Any], reads: list[Read], write: Write) -> Step:
    if len(reads) == 1:
        (read,) = reads
        return lambda: write(function(read()))
    if len(reads) == 2:
        a, b = reads
        return lambda: write(function(a(), b()))
    a, b, c = reads
    if isinstance(function, np.ufunc):  # min and max of three (sm_100)
        return lambda: write(function(function(a(), b()), c()))
    return lambda: write(function(a(), b(), c()))


def _fma(kind: str, relu: bool) -> Callable[..., Any]:
    wide = np.longdouble if kind == "f64" else np.float64

    def fma(a: Any, b: Any, c: Any) -> Any:
        result = a.astype(wide)
        result = result * b + c
        return np.maximum(result, 0) if relu else result

    return fma


def _as_f32(read: Read) -> Read:
    return lambda: read().astype(np.float32)


def _flushed(read: Read) -> Read:
    return lambda: flush(read())


def _flush_then(write: Write) -> Write:
    return lambda value: write(flush(value.astype(np.float32)))


def _saturate_then(write: Write) -> Write:
    """.sat: to [0, 1], NaN to 0."""
    return lambda value: write(np.clip(np.nan_to_num(value, nan=0.0), 0, 1).astype(value.dtype))


@instruction("fma")
def fma(x: Operation) -> Step:
    return arithmetic(x)


@instruction("sqrt", "rsqrt", "rcp", "ex2", "lg2", "sin", "cos", "tanh")
def special_function(x: Operation) -> Step:
    return arithmetic(x)


@instruction("copysign")
def copysign(x: Operation) -> Step:
    """copysign d, a, b: the sign of a on the magnitude of b."""
    kind = x.modifiers.last_type({"f32", "f64"})
    target, a, b = x.operands(3)
    read_a, read_b, write = x.read(a, kind), x.read(b, kind), x.write(target, kind)
    return lambda: write(np.copysign(read_b(), read_a()))


@instruction("testp")
def testp(x: Operation) -> Step:
    kind = x.modifiers.last_type({"f32", "f64"})
    what = x.modifiers.required("finite", "infinite", "number", "notanumber")
    target, a = x.operands(2)
    read, write = x.read(a, kind), x.write(target, "pred")
    function = {"finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan}.get(what)
    if function is None:
        return lambda: write(~np.isnan(read()))
    if function is np.isfinite:
        return lambda: write(np.isfinite(read()))
    test: Callable[..., Any] = function
    return lambda: write(test(read()))
