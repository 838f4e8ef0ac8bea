"""Branches, exits, barriers; and what orders memory, which is in order anyway."""

from __future__ import annotations

from fusetune.sim.errors import SimError, UnknownInstruction
from fusetune.sim.ptx.instructions.registry import instruction
from fusetune.sim.ptx.operation import Operation, Read
from fusetune.sim.ptx.threads import Step


def _guard(x: Operation) -> Read | None:
    guard = x.instruction.guard
    if guard is None:
        return None
    return x.read(("!" if x.instruction.negated else "") + guard, "pred")


@instruction("bra")
def bra(x: Operation) -> Step:
    x.modifiers.ignore("uni")
    (label,) = x.operands(1)
    if label not in x.labels:
        raise UnknownInstruction(f"no label {label}")
    m, target, taken = x.machine, x.labels[label], _guard(x)
    if taken is None:
        return lambda: m.branch(None, target)
    return lambda: m.branch(taken(), target)


@instruction("ret", "exit")
def leave(x: Operation) -> Step:
    x.modifiers.ignore("uni")
    x.operands(0)
    m, taken = x.machine, _guard(x)
    return lambda: m.exit(None if taken is None else taken())


@instruction("trap")
def trap(x: Operation) -> Step:
    x.operands(0)
    m, taken = x.machine, _guard(x)

    def step() -> None:
        hit = m.mask
        if taken is not None:
            holds = taken()
            hit = holds if hit is None else hit & holds
        if hit is None or hit.any():
            raise SimError("the kernel trapped")

    return step


@instruction("bar", "barrier")
def barrier(x: Operation) -> Step:
    m = x.machine
    if x.modifiers.flag("warp"):
        x.modifiers.required("sync")
        (members,) = x.operands(1)
        if _guard(x) is not None:
            raise UnknownInstruction("a predicated bar.warp.sync")
        mask = x.read(members, "u32")
        return lambda: m.require_converged(mask())
    x.modifiers.ignore("cta", "aligned")
    x.modifiers.required("sync")
    operands = x.operands(1, 2)
    number = x.constant(operands[0])
    threads = x.constant(operands[1]) if len(operands) > 1 else None
    taken = _guard(x)

    def step() -> None:
        if threads not in (None, m.per_cta):
            raise UnknownInstruction(f"a barrier of {threads} of the CTA's {m.per_cta} threads")
        m.arrive(None if taken is None else taken(), number)

    return step


@instruction("membar", "fence")
def fence(x: Operation) -> Step:
    x.operands(0)
    x.modifiers.ignore("sc", "acq_rel", "acquire", "release", "cta", "cluster", "gpu", "gl", "sys")
    return _nothing


@instruction("nanosleep", "griddepcontrol", "prefetch", "prefetchu")
def without_effect(x: Operation) -> Step:
    x.modifiers.ignore("u32", "wait", "launch_dependents", "global", "L1", "L2")
    return _nothing


def _nothing() -> None:
    pass
