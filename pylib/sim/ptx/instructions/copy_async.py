"""cp.async: copies from global to shared memory that are waited for in groups."""

from __future__ import annotations

import numpy as np

from fusetune.sim.errors import UnknownInstruction
from fusetune.sim.ptx.instructions.load_store import take_space
from fusetune.sim.ptx.instructions.registry import instruction
from fusetune.sim.ptx.machine import Machine
from fusetune.sim.ptx.operation import Operation
from fusetune.sim.ptx.threads import Step
from fusetune.sim.ptx.types import UNSIGNED, Array


@instruction("cp")
def cp(x: Operation) -> Step:
    x.modifiers.required("async")
    m = x.machine
    if x.modifiers.flag("commit_group"):
        x.operands(0)
        return lambda: m.copies.commit()
    if x.modifiers.flag("wait_all"):
        x.operands(0)
        return lambda: m.copies.wait(None)
    if x.modifiers.flag("wait_group"):
        groups = x.constant(x.operands(1)[0])
        return lambda: m.copies.wait(groups)
    return _copy(x)


def _copy(x: Operation) -> Step:
    x.modifiers.required("ca", "cg")
    if take_space(x, "shared") != "shared":
        raise UnknownInstruction("cp.async to another space than shared")
    x.modifiers.required("global")
    x.modifiers.matching(r"L2::(64|128|256)B")
    hinted = x.modifiers.flag("L2::cache_hint")
    target, source, size, *rest = x.operands(*((4, 5) if hinted else (3, 4)))
    count = x.constant(size)
    if count not in (4, 8, 16):
        raise UnknownInstruction(f"{count} bytes")
    if hinted:
        rest = rest[:-1]
    m = x.machine
    to, origin = x.address(target), x.address(source)
    dtype, parts = UNSIGNED[min(count, 8)], max(1, count // 8)
    read_bytes = x.read(rest[0], "u32") if rest else None

    def step() -> None:
        at = m.shared.begin_copy(m, to(), count)
        if read_bytes is None:
            values = m.memory.load(m, origin(), dtype, parts)
        else:
            values = _load_some(m, origin(), m.spread(read_bytes()), dtype, parts)
        m.copies.issue(at, list(values))

    return step


def _load_some(
    m: Machine, address: Array, count: Array, dtype: np.dtype[np.unsignedinteger], parts: int
) -> list[Array]:
    """The first `count` bytes of each thread, none or all; zeros for the rest."""
    whole = dtype.itemsize * parts
    everything = count == whole
    wanted = everything if m.mask is None else everything & m.mask
    partial = ~everything & (count != 0)
    if (partial if m.mask is None else partial & m.mask).any():
        raise UnknownInstruction("a cp.async that reads some of its bytes")
    if not wanted.any():
        return [np.zeros(m.lanes, dtype) for _ in range(parts)]
    outer, active = m.mask, m.active
    m.mask, m.active = None if wanted.all() else wanted, int(np.count_nonzero(wanted))
    try:
        values = m.memory.load(m, address, dtype, parts)
    finally:
        m.mask, m.active = outer, active
    return [np.where(wanted, value, dtype.type(0)) for value in values]
