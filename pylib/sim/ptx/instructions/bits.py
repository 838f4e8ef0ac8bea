"""Logic, shifts and bit fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fusetune.sim.ptx.instructions.registry import instruction
from fusetune.sim.ptx.operation import Operation
from fusetune.sim.ptx.threads import Step
from fusetune.sim.ptx.types import DTYPES, UNSIGNED, Value

_LOGIC: dict[str, Callable[..., Any]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
_WORDS = {"b16", "b32", "b64"}


@instruction("and", "or", "xor")
def logic(x: Operation) -> Step:
    kind = x.modifiers.last_type({*_WORDS, "pred"})
    target, a, b = x.operands(3)
    read_a, read_b, write = x.read(a, kind), x.read(b, kind), x.write(target, kind)
    function = _LOGIC[x.mnemonic]
    return lambda: write(function(read_a(), read_b()))


@instruction("not")
def invert(x: Operation) -> Step:
    kind = x.modifiers.last_type({*_WORDS, "pred"})
    target, a = x.operands(2)
    read, write = x.read(a, kind), x.write(target, kind)
    return lambda: write(~read())


@instruction("cnot")
def is_zero(x: Operation) -> Step:
    kind = x.modifiers.last_type(_WORDS)
    target, a = x.operands(2)
    read, write, dtype = x.read(a, kind), x.write(target, kind), DTYPES[kind]
    return lambda: write((read() == 0).astype(dtype))


@instruction("shl", "shr")
def shift(x: Operation) -> Step:
    """Shifts of the width or more give zeros, or the sign."""
    left = x.mnemonic == "shl"
    kind = x.modifiers.last_type(_WORDS if left else {*_WORDS, *_SHIFTABLE})
    target, a, amount = x.operands(3)
    read, read_amount, write = x.read(a, kind), x.read(amount, "u32"), x.write(target, kind)
    dtype = DTYPES[kind]
    bits = 8 * dtype.itemsize
    function = np.left_shift if left else np.right_shift
    if not x.is_register(amount):
        constant = x.constant(amount)
        if constant < bits:
            fixed = dtype.type(constant)
            return lambda: write(function(read(), fixed))

    def step() -> None:
        value, by = read(), read_amount()
        shifted = function(value, np.minimum(by, bits - 1).astype(dtype))
        beyond = function(shifted, dtype.type(1)) if dtype.kind == "i" else dtype.type(0)
        write(np.where(by >= bits, beyond, shifted))

    return step


_SHIFTABLE = {f"{sign}{bits}" for sign in "us" for bits in (16, 32, 64)}


@instruction("shf")
def funnel_shift(x: Operation) -> Step:
    """The upper word of b:a shifted left, or the lower one of it shifted right."""
    x.modifiers.last_type({"b32"})
    left = x.modifiers.required("l", "r") == "l"
    clamp = x.modifiers.required("clamp", "wrap") == "clamp"
    target, a, b, amount = x.operands(4)
    read_a, read_b, read_amount = (x.read(operand, "u32") for operand in (a, b, amount))
    write = x.write(target, "b32")

    def step() -> None:
        both = (read_b().astype(np.uint64) << np.uint64(32)) | read_a().astype(np.uint64)
        by = read_amount()
        by = np.minimum(by, np.uint32(32)) if clamp else by & np.uint32(31)
        if left:
            write(((both << by.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32))
        else:
            write((both >> by.astype(np.uint64)).astype(np.uint32))

    return step


def _ones(count: Value) -> Value:
    """Words with the lower `count` bits set; count up to 64."""
    whole = np.uint64(0xFFFFFFFFFFFFFFFF)
    some = (np.uint64(1) << np.minimum(count, np.uint64(63))) - np.uint64(1)
    return np.where(count >= 64, whole, some)


@instruction("bfe")
def extract(x: Operation) -> Step:
    """A field of a at a position, of a length; beyond the word it reads zeros, or the sign."""
    kind = x.modifiers.last_type({"u32", "s32", "u64", "s64"})
    target, a, position, length = x.operands(4)
    wide = "i8" if kind[0] == "s" else "u8"
    dtype, bits = DTYPES[kind], int(kind[1:])
    read, write = x.read(a, kind), x.write(target, kind)
    read_position, read_length = x.read(position, "u32"), x.read(length, "u32")

    def step() -> None:
        at = (read_position() & np.uint32(255)).astype(np.uint64)
        count = (read_length() & np.uint32(255)).astype(np.uint64)
        value = read().astype(wide)
        shifted = (value >> np.minimum(at, np.uint64(63)).astype(wide)).view(np.uint64)
        if wide == "u8":
            shifted = np.where(at > 63, np.uint64(0), shifted)
        field = shifted & _ones(count)
        if wide == "i8":  # the field's top bit, or the word's where the field goes beyond it
            top = np.minimum(at + count - np.uint64(1), np.uint64(bits - 1))
            sign = ((value.view(np.uint64) >> top) & np.uint64(1)).astype(np.bool_)
            field = np.where(sign & (count > 0), field | ~_ones(count), field)
        write(field.astype(UNSIGNED[dtype.itemsize]).view(dtype))

    return step


@instruction("bfi")
def insert(x: Operation) -> Step:
    """b with a field replaced by the lower bits of a."""
    kind = x.modifiers.last_type({"b32", "b64"})
    target, a, b, position, length = x.operands(5)
    dtype, bits = DTYPES[kind], np.uint64(int(kind[1:]))
    read_a, read_b, write = x.read(a, kind), x.read(b, kind), x.write(target, kind)
    read_position, read_length = x.read(position, "u32"), x.read(length, "u32")

    def step() -> None:
        at = (read_position() & np.uint32(255)).astype(np.uint64)
        count = (read_length() & np.uint32(255)).astype(np.uint64)
        by = np.minimum(at, np.uint64(63))
        field = np.where(at >= bits, np.uint64(0), _ones(count) << by)
        moved = (read_a().astype(np.uint64) << by) & field
        write(((read_b().astype(np.uint64) & ~field) | moved).astype(dtype))

    return step


@instruction("lop3")
def lop3(x: Operation) -> Step:
    """Any function of three bits; bit 4a + 2b + c of the table is its value."""
    x.modifiers.last_type({"b32"})
    target, a, b, c, table = x.operands(5)
    reads = [x.read(operand, "b32") for operand in (a, b, c)]
    write = x.write(target, "b32")
    terms = [i for i in range(8) if x.constant(table) >> i & 1]

    def step() -> None:
        first, second, third = (read() for read in reads)
        result = first & np.uint32(0)
        for i in terms:
            result = result | (
                (first if i & 4 else ~first)
                & (second if i & 2 else ~second)
                & (third if i & 1 else ~third)
            )
        write(result)

    return step


@instruction("popc", "clz", "brev", "bfind")
def count_bits(x: Operation) -> Step:
    signed = {"s32", "s64"} if x.mnemonic == "bfind" else set()
    words = {"u32", "u64"} if x.mnemonic == "bfind" else {"b32", "b64"}
    kind = x.modifiers.last_type(words | signed)
    shift_amount = x.mnemonic == "bfind" and x.modifiers.flag("shiftamt")
    target, a = x.operands(2)
    read, m = x.read(a, kind), x.machine
    bits = 8 * DTYPES[kind].itemsize
    word = UNSIGNED[bits // 8]

    def unpacked(value: Value) -> Any:
        data = m.spread(value).view(np.uint8).reshape(m.lanes, bits // 8)
        return np.unpackbits(data, axis=1, bitorder="little")

    if x.mnemonic == "brev":
        write = x.write(target, kind)

        def reverse() -> None:
            turned = np.packbits(unpacked(read())[:, ::-1], axis=1, bitorder="little")
            write(turned.view(word)[:, 0])

        return reverse
    write = x.write(target, "u32")
    if x.mnemonic == "popc":
        return lambda: write(unpacked(read()).sum(1, dtype=np.uint32))

    def leading() -> None:
        value = m.spread(read())
        if kind[0] == "s":
            value = np.where(value < 0, ~value, value)
        found = unpacked(value)
        zeros = np.where(found.any(1), found[:, ::-1].argmax(1), bits)
        if x.mnemonic == "clz":
            write(zeros.astype(np.uint32))
            return
        position = zeros if shift_amount else bits - 1 - zeros
        write(np.where(zeros == bits, np.uint32(0xFFFFFFFF), position.astype(np.uint32)))

    return leading
