"""mov, cvta, selp, prmt, isspacep, createpolicy: values go elsewhere unchanged."""

from __future__ import annotations

import numpy as np

from fusetune.sim.errors import UnknownInstruction
from fusetune.sim.ptx.access import LOCAL_WINDOW, SHARED_WINDOW
from fusetune.sim.ptx.instructions.registry import instruction
from fusetune.sim.ptx.operation import Operation
from fusetune.sim.ptx.threads import Step
from fusetune.sim.ptx.types import BITS, DTYPES, FLOATS, INTEGERS, UNSIGNED, Array, Value

_MOVABLE = {*BITS, *INTEGERS, *FLOATS, "pred"}


@instruction("mov")
def mov(x: Operation) -> Step:
    kind = x.modifiers.last_type(_MOVABLE)
    target, source = x.operands(2)
    if target.startswith("{"):
        return _unpack(x, kind)
    if source.startswith("{"):
        return _pack(x, kind)
    m = x.machine
    if x.is_register(source) and target != "_":
        from_index, from_kind = x.register(source)
        to_index, to_kind = x.register(target)
        if DTYPES[from_kind].itemsize == DTYPES[to_kind].itemsize == DTYPES[kind].itemsize:
            return lambda: m.move(from_index, to_index)
    read, write = x.read(source, kind), x.write(target, kind)
    return lambda: write(read())


def _unpack(x: Operation, kind: str) -> Step:
    """mov.b32 {lo, hi}, source"""
    targets = x.vector(x.instruction.operands[0])
    size = DTYPES[kind].itemsize // len(targets)
    if size not in UNSIGNED or size * len(targets) != DTYPES[kind].itemsize:
        raise UnknownInstruction(f"{len(targets)} parts of a .{kind}")
    part, name = UNSIGNED[size], f"b{8 * size}"
    m = x.machine
    read = x.read(x.instruction.operands[1], kind)
    writes = [x.write(target, name) for target in targets]

    def step() -> None:
        pieces = m.spread(read()).view(part).reshape(m.lanes, len(writes))
        for i, write in enumerate(writes):
            write(pieces[:, i])

    return step


def _pack(x: Operation, kind: str) -> Step:
    """mov.b32 target, {lo, hi}"""
    sources = x.vector(x.instruction.operands[1])
    size = DTYPES[kind].itemsize // len(sources)
    if size not in UNSIGNED or size * len(sources) != DTYPES[kind].itemsize:
        raise UnknownInstruction(f"{len(sources)} parts of a .{kind}")
    part, whole = UNSIGNED[size], UNSIGNED[DTYPES[kind].itemsize]
    m = x.machine
    reads = [x.read(source, f"b{8 * size}") for source in sources]
    write = x.write(x.instruction.operands[0], f"b{8 * whole.itemsize}")

    def step() -> None:
        pieces = np.empty((m.lanes, len(reads)), part)
        for i, read in enumerate(reads):
            pieces[:, i] = read()
        write(pieces.view(whole)[:, 0])

    return step


@instruction("cvta")
def cvta(x: Operation) -> Step:
    kind = x.modifiers.last_type({"u32", "u64"})
    to = x.modifiers.flag("to")
    space = x.modifiers.required("global", "shared", "local", "const", "param")
    target, source = x.operands(2)
    read, write = x.read(source, kind), x.write(target, kind)
    if space in ("global", "const"):
        return lambda: write(read())
    if space == "param" or kind == "u32":
        raise UnknownInstruction(f"cvta of .{space}.{kind}")
    window = np.uint64(SHARED_WINDOW if space == "shared" else LOCAL_WINDOW)
    if to:
        return lambda: write(read() - window)
    return lambda: write(read() + window)


@instruction("selp")
def selp(x: Operation) -> Step:
    kind = x.modifiers.last_type({*BITS, *INTEGERS, *FLOATS})
    target, yes, no, condition = x.operands(4)
    holds = x.read(condition, "pred")
    read_yes, read_no = x.read(yes, kind), x.read(no, kind)
    write, dtype = x.write(target, kind), DTYPES[kind]

    def step() -> None:
        chosen: Value = np.where(holds(), read_yes(), read_no())
        write(chosen if chosen.dtype == dtype else chosen.astype(dtype))

    return step


@instruction("prmt")
def prmt(x: Operation) -> Step:
    """Bytes of a and b chosen by four nibbles; the nibble's top bit replicates the sign."""
    x.modifiers.last_type({"b32"})
    target, a, b, selector = x.operands(4)
    read_a, read_b, write = x.read(a, "b32"), x.read(b, "b32"), x.write(target, "b32")
    m = x.machine
    if not x.is_register(selector):
        chosen = [x.constant(selector) >> 4 * i & 15 for i in range(4)]
        if all(nibble < 8 for nibble in chosen):
            return lambda: write(_permute(m.spread(read_a()), m.spread(read_b()), chosen))
    read_selector = x.read(selector, "b32")

    def step() -> None:
        source = np.stack([m.spread(read_a()), m.spread(read_b())], axis=1).view(np.uint8)
        nibbles = m.spread(read_selector())[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)
        picked = np.take_along_axis(source, (nibbles & 7).astype(np.int64), axis=1)
        sign = np.where(picked & 128, 255, 0).astype(np.uint8)
        result = np.where(nibbles & 8, sign, picked)
        write(np.ascontiguousarray(result).view(np.uint32)[:, 0])

    return step


def _permute(a: Array, b: Array, chosen: list[int]) -> Array:
    source_a, source_b = a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4)
    result = np.empty((len(a), 4), np.uint8)
    for i, nibble in enumerate(chosen):
        result[:, i] = (source_a if nibble < 4 else source_b)[:, nibble & 3]
    return result.view(np.uint32)[:, 0]


@instruction("isspacep")
def isspacep(x: Operation) -> Step:
    space = x.modifiers.required("global", "shared", "local")
    target, address = x.operands(2)
    read, write = x.read(address, "u64"), x.write(target, "pred")
    low, high = {
        "global": (0, SHARED_WINDOW),
        "shared": (SHARED_WINDOW, LOCAL_WINDOW),
        "local": (LOCAL_WINDOW, 1 << 63),
    }[space]

    def step() -> None:
        value = read()
        write((value >= np.uint64(low)) & (value < np.uint64(high)))

    return step


@instruction("createpolicy")
def createpolicy(x: Operation) -> Step:
    """A cache policy: nothing here depends on its value."""
    x.modifiers.last_type({"b64"})
    x.modifiers.required("fractional")
    x.modifiers.matching(r"L2::evict_\w+")
    x.modifiers.matching(r"L2::evict_\w+")
    write = x.write(x.operands(1, 2)[0], "b64")
    return lambda: write(np.uint64(0))
