"""Integer arithmetic. Where signedness does not matter, values stay unsigned: they wrap."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fusetune.sim.errors import UnknownInstruction
from fusetune.sim.ptx.instructions import floating
from fusetune.sim.ptx.instructions.registry import instruction
from fusetune.sim.ptx.operation import CARRY, Operation, Read
from fusetune.sim.ptx.threads import Step
from fusetune.sim.ptx.types import DTYPES, INTEGERS, Value

_NUMBERS = {name: dtype for name, dtype in INTEGERS.items() if dtype.itemsize > 1}


def _is_integer(x: Operation) -> bool:
    return x.instruction.modifiers[-1:] != () and x.instruction.modifiers[-1] in _NUMBERS


@instruction("add", "sub", "addc", "subc")
def add(x: Operation) -> Step:
    """.cc sets the carry (of sub: the borrow), addc and subc take it in."""
    if not _is_integer(x):
        return floating.arithmetic(x)
    kind = x.modifiers.last_type(_NUMBERS)
    target, a, b = x.operands(3)
    unsigned = f"u{kind[1:]}"
    read_a, read_b, write = x.read(a, unsigned), x.read(b, unsigned), x.write(target, unsigned)
    function = np.add if x.mnemonic.startswith("add") else np.subtract
    if not x.modifiers.flag("cc") and not x.mnemonic.endswith("c"):
        if x.mnemonic == "sub":
            return lambda: write(read_a() - read_b())
        return lambda: write(read_a() + read_b())
    return _with_carry(x, function, (read_a, read_b), unsigned)


def _with_carry(x: Operation, function: np.ufunc, reads: tuple[Read, Read], kind: str) -> Step:
    """a + b, a - b with carries. reads: a and b as unsigned words."""
    read_a, read_b = reads
    write, write_carry = x.write(x.instruction.operands[0], kind), x.write(CARRY, "pred")
    sets = "cc" in x.instruction.modifiers
    read_carry = x.read(CARRY, "pred") if x.mnemonic.endswith("c") else None
    dtype = DTYPES[kind]
    added = function is np.add

    def step() -> None:
        first, second = read_a(), read_b()
        result = function(first, second)
        carry = result < first if added else first < second
        if read_carry is not None:
            given = read_carry().astype(dtype)
            before, result = result, function(result, given)
            carry = carry | ((result < before) if added else (before < given))
        if sets:
            write_carry(carry)
        write(result)

    return step


@instruction("mul", "mad", "madc")
def mul(x: Operation) -> Step:
    if not _is_integer(x):
        return floating.arithmetic(x)
    kind = x.modifiers.last_type(_NUMBERS)
    part = x.modifiers.required("lo", "hi", "wide")
    size = DTYPES[kind].itemsize
    result = f"{kind[0]}{16 * size}" if part == "wide" else kind
    if result not in _NUMBERS:
        raise UnknownInstruction(f".wide.{kind}")
    target, a, b, *c = x.operands(3 if x.mnemonic == "mul" else 4)
    product = _PRODUCTS[part](x, kind, a, b)
    unsigned = f"u{result[1:]}"
    write = x.write(target, unsigned)
    if not c:
        return lambda: write(product())
    addend = x.read(c[0], unsigned)
    if x.modifiers.flag("cc") or x.mnemonic == "madc":
        return _with_carry(x, np.add, (product, addend), unsigned)
    return lambda: write(product() + addend())


def _low(x: Operation, kind: str, a: str, b: str) -> Callable[[], Value]:
    unsigned = f"u{kind[1:]}"
    read_a, read_b = x.read(a, unsigned), x.read(b, unsigned)
    return lambda: read_a() * read_b()


def _wide(x: Operation, kind: str, a: str, b: str) -> Callable[[], Value]:
    read_a, read_b = x.read(a, kind), x.read(b, kind)
    bits = int(kind[1:])
    wide, unsigned = DTYPES[f"{kind[0]}{2 * bits}"], DTYPES[f"u{2 * bits}"]
    return lambda: (read_a().astype(wide) * read_b().astype(wide)).view(unsigned)


def _high(x: Operation, kind: str, a: str, b: str) -> Callable[[], Value]:
    bits = int(kind[1:])
    unsigned = DTYPES[f"u{bits}"]
    if bits < 64:
        wide = _wide(x, kind, a, b)
        shift = DTYPES[f"u{2 * bits}"].type(bits)
        return lambda: (wide() >> shift).astype(unsigned)
    read_a, read_b = x.read(a, kind), x.read(b, kind)
    return lambda: _high_64(read_a(), read_b(), kind == "s64")


def _high_64(a: Value, b: Value, signed: bool) -> Value:
    """The upper half of a 128-bit product, by halves of 32 bits."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    ua, ub = a.view(np.uint64), b.view(np.uint64)
    a0, a1, b0, b1 = ua & low, ua >> shift, ub & low, ub >> shift
    middle = (a0 * b0 >> shift) + a1 * b0
    other = (middle & low) + a0 * b1
    high = a1 * b1 + (middle >> shift) + (other >> shift)
    if signed:
        high = high - np.where(a < 0, ub, np.uint64(0)) - np.where(b < 0, ua, np.uint64(0))
    return high


_PRODUCTS = {"lo": _low, "wide": _wide, "hi": _high}


@instruction("div", "rem")
def div(x: Operation) -> Step:
    """Truncating. Division by zero gives all ones, the remainder then the dividend."""
    if not _is_integer(x):
        return floating.arithmetic(x)
    kind = x.modifiers.last_type(_NUMBERS)
    target, a, b = x.operands(3)
    read_a, read_b, write = x.read(a, kind), x.read(b, kind), x.write(target, kind)
    dtype = DTYPES[kind]
    quotient = x.mnemonic == "div"

    def step() -> None:
        dividend, divisor = read_a(), read_b()
        safe = np.where(divisor == 0, dtype.type(1), divisor)
        remainder = np.fmod(dividend, safe).astype(dtype)
        if quotient:
            exact = ((dividend - remainder) // safe).astype(dtype)
            write(np.where(divisor == 0, ~dtype.type(0), exact))
        else:
            write(np.where(divisor == 0, dividend, remainder))

    return step


@instruction("min", "max")
def extremum(x: Operation) -> Step:
    if not _is_integer(x):
        return floating.arithmetic(x)
    kind = x.modifiers.last_type(_NUMBERS)
    target, a, b = x.operands(3)
    read_a, read_b, write = x.read(a, kind), x.read(b, kind), x.write(target, kind)
    function = np.minimum if x.mnemonic == "min" else np.maximum
    return lambda: write(function(read_a(), read_b()))


@instruction("neg", "abs")
def sign(x: Operation) -> Step:
    if not _is_integer(x):
        return floating.arithmetic(x)
    kind = x.modifiers.last_type({"s16", "s32", "s64"})
    target, a = x.operands(2)
    read, write = x.read(a, kind), x.write(target, kind)
    function = np.negative if x.mnemonic == "neg" else np.abs
    return lambda: write(function(read()))


@instruction("sad")
def sad(x: Operation) -> Step:
    kind = x.modifiers.last_type({"u16", "s16", "u32", "s32"})
    target, a, b, c = x.operands(4)
    read_a, read_b, read_c = x.read(a, kind), x.read(b, kind), x.read(c, kind)
    write = x.write(target, kind)

    def step() -> None:
        first, second = read_a(), read_b()
        write(np.where(first < second, second - first, first - second) + read_c())

    return step
