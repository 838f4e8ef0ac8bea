"""atom and red: read-modify-write, one thread after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fusetune.sim.errors import UnknownInstruction
from fusetune.sim.ptx.instructions.load_store import take_space
from fusetune.sim.ptx.instructions.registry import instruction
from fusetune.sim.ptx.memory import GlobalMemory, LocalMemory, space_of
from fusetune.sim.ptx.operation import Operation
from fusetune.sim.ptx.shared_memory import SharedMemory
from fusetune.sim.ptx.threads import Step
from fusetune.sim.ptx.types import DTYPES, Array, bf16_to_f32, f32_to_bf16

_ADDABLE = {"u32", "s32", "u64", "s64", "f16", "bf16", "f16x2", "bf16x2", "f32", "f64"}
_TYPES = {
    "add": _ADDABLE,
    "min": {"u32", "s32", "u64", "s64"},
    "max": {"u32", "s32", "u64", "s64"},
    "and": {"b32", "b64"},
    "or": {"b32", "b64"},
    "xor": {"b32", "b64"},
    "exch": {"b32", "b64"},
    "cas": {"b16", "b32", "b64"},
    "inc": {"u32"},
    "dec": {"u32"},
}


def _add(kind: str) -> Callable[[Any, Any], Any]:
    if kind in ("bf16", "bf16x2"):

        def add_bf16(old: Any, operand: Any) -> Any:
            parts = (np.atleast_1d(v).view(np.uint16) for v in (old, operand))
            a, b = (bf16_to_f32(part) for part in parts)
            return f32_to_bf16(a + b).view(DTYPES[kind])[0]

        return add_bf16
    if kind == "f16x2":

        def add_f16(old: Any, operand: Any) -> Any:
            a, b = (np.atleast_1d(v).view(np.float16) for v in (old, operand))
            return (a + b).view(np.uint32)[0]

        return add_f16
    return lambda old, operand: old + operand


_SIMPLE: dict[str, Callable[[Any, Any], Any]] = {
    "min": min,
    "max": max,
    "and": lambda old, operand: old & operand,
    "or": lambda old, operand: old | operand,
    "xor": lambda old, operand: old ^ operand,
    "exch": lambda _old, operand: operand,
    "inc": lambda old, limit: old.dtype.type(0) if old >= limit else old + old.dtype.type(1),
    "dec": lambda old, limit: limit if old == 0 or old > limit else old - old.dtype.type(1),
}


@instruction("atom", "red")
def atomic(x: Operation) -> Step:
    kind = x.modifiers.last_type(DTYPES)
    name = x.modifiers.required(*_TYPES)
    if kind not in _TYPES[name]:
        raise UnknownInstruction(f"atomic {name} of .{kind}")
    space = take_space(x, "global", "shared")
    x.modifiers.ignore("relaxed", "acquire", "release", "acq_rel", "noftz")
    x.modifiers.ignore("cta", "cluster", "gpu", "sys")
    vector = x.modifiers.one_of("v2", "v4", "v8")
    count = int(vector[1:]) if vector else 1
    returns = x.mnemonic == "atom"
    operands = x.operands(2 + returns + (name == "cas"))
    targets = x.vector(operands[0]) if returns else []
    place, *sources = operands[returns:]
    vectors = [x.vector(source) for source in sources]
    if any(len(v) != count for v in vectors) or (returns and len(targets) != count):
        raise UnknownInstruction("registers of a vector")
    reads = [[x.read(register, kind) for register in v] for v in vectors]
    writes = [x.write(register, kind) for register in targets]
    address, m = x.address(place), x.machine
    dtype = DTYPES[kind]
    function = _add(kind) if name == "add" else _SIMPLE.get(name)

    def memory_at(at: Array) -> GlobalMemory | SharedMemory | LocalMemory:
        if space == "generic":
            return space_of(m, at)
        return m.memory if space == "global" else m.shared

    def step() -> None:
        at = address()
        data, offsets = memory_at(at).atomic(m, at, dtype.itemsize * count)
        words = data.view(dtype)
        operands = [[m.spread(read()) for read in v] for v in reads]
        before = [np.zeros(m.lanes, dtype) for _ in range(count)]
        lanes = range(m.lanes) if m.mask is None else np.flatnonzero(m.mask)
        first = offsets // dtype.itemsize
        for lane in lanes:
            for i in range(count):
                word = int(first[lane]) + i
                old = before[i][lane] = words[word]
                if function is not None:
                    words[word] = function(old, operands[0][i][lane])
                elif old == operands[0][i][lane]:  # cas
                    words[word] = operands[1][i][lane]
        for write, value in zip(writes, before, strict=returns):
            write(value)

    return step
