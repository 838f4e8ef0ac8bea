"""ld and st of all state spaces."""

from __future__ import annotations

import re

import numpy as np

from fusetune.sim.errors import UnknownInstruction
from fusetune.sim.ptx.instructions.registry import instruction
from fusetune.sim.ptx.memory import space_of
from fusetune.sim.ptx.operation import Operation, Write
from fusetune.sim.ptx.threads import Step
from fusetune.sim.ptx.types import BITS, DTYPES, FLOATS, INTEGERS, UNSIGNED

_TYPES = {*BITS, *INTEGERS, *FLOATS}
_PARAMETER = re.compile(r"\[\s*([\w$]+)\s*(?:\+\s*(\d+))?\s*\]$")


def take_space(x: Operation, *spaces: str) -> str:
    """The state space; "generic" where none is named."""
    if x.modifiers.flag("shared::cta"):
        return "shared"
    return x.modifiers.one_of(*spaces) or "generic"


def take_cache_hints(x: Operation) -> bool:
    """Hints on caching and memory ordering change nothing. Whether a policy operand follows."""
    x.modifiers.ignore("weak", "volatile", "relaxed", "acquire", "release", "nc")
    x.modifiers.ignore("cta", "cluster", "gpu", "sys")
    x.modifiers.ignore("ca", "cg", "cs", "cv", "lu", "wb", "wt")
    x.modifiers.matching(r"L1::(evict_\w+|no_allocate)")
    x.modifiers.matching(r"L2::evict_\w+")
    x.modifiers.matching(r"L2::(64|128|256)B")
    return x.modifiers.flag("L2::cache_hint")


def _take_count(x: Operation) -> int:
    vector = x.modifiers.one_of("v2", "v4", "v8")
    return int(vector[1:]) if vector else 1


@instruction("ld", "ldu")
def load(x: Operation) -> Step:
    kind = x.modifiers.last_type(_TYPES)
    space = take_space(x, "global", "shared", "local", "param", "const")
    count = _take_count(x)
    hinted = take_cache_hints(x)
    targets, place = x.operands(3 if hinted else 2)[:2]
    registers = x.vector(targets)
    if len(registers) != count:
        raise UnknownInstruction(f"{len(registers)} registers")
    writes = [x.write(register, kind) for register in registers]
    if space == "param":
        return _load_parameter(x, kind, place, writes)
    m, dtype = x.machine, DTYPES[kind]
    address = x.address(place)

    def from_anywhere() -> None:
        at = address()
        for write, value in zip(writes, space_of(m, at).load(m, at, dtype, count), strict=True):
            write(value)

    def from_global() -> None:
        values = m.memory.load(m, address(), dtype, count)
        for write, value in zip(writes, values, strict=True):
            write(value)

    def from_shared() -> None:
        values = m.shared.load(m, address(), dtype, count)
        for write, value in zip(writes, values, strict=True):
            write(value)

    def from_local() -> None:
        values = m.local.load(m, address(), dtype, count)
        for write, value in zip(writes, values, strict=True):
            write(value)

    return {
        "generic": from_anywhere,
        "global": from_global,
        "const": from_global,
        "shared": from_shared,
        "local": from_local,
    }[space]


def _load_parameter(x: Operation, kind: str, place: str, writes: list[Write]) -> Step:
    match = _PARAMETER.match(place)
    if match is None or match[1] not in x.params:
        raise UnknownInstruction(f"parameter {place}")
    offset, parameter = x.params[match[1]]
    begin, size = int(match[2] or 0), DTYPES[kind].itemsize
    if begin + size * len(writes) > parameter.size:
        raise UnknownInstruction(f"reads beyond parameter {match[1]}")
    m, unsigned = x.machine, UNSIGNED[size]
    dtype = DTYPES[kind]

    def step() -> None:
        values = np.frombuffer(m.params, unsigned, len(writes), offset + begin).view(dtype)
        for write, value in zip(writes, values, strict=True):
            write(value)

    return step


@instruction("st")
def store(x: Operation) -> Step:
    kind = x.modifiers.last_type(_TYPES)
    space = take_space(x, "global", "shared", "local")
    count = _take_count(x)
    hinted = take_cache_hints(x)
    place, sources = x.operands(3 if hinted else 2)[:2]
    registers = x.vector(sources)
    if len(registers) != count:
        raise UnknownInstruction(f"{len(registers)} registers")
    m = x.machine
    reads = [x.read(register, kind) for register in registers]
    address = x.address(place)

    def to_anywhere() -> None:
        at = address()
        space_of(m, at).store(m, at, [read() for read in reads])

    return {
        "generic": to_anywhere,
        "global": lambda: m.memory.store(m, address(), [read() for read in reads]),
        "shared": lambda: m.shared.store(m, address(), [read() for read in reads]),
        "local": lambda: m.local.store(m, address(), [read() for read in reads]),
    }[space]
