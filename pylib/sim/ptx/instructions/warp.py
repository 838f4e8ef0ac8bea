"""Exchange between the threads of a warp: shfl, vote, match, redux, activemask, elect."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusetune.sim.errors import SimError
from fusetune.sim.ptx.instructions.registry import instruction
from fusetune.sim.ptx.machine import Machine
from fusetune.sim.ptx.operation import Operation
from fusetune.sim.ptx.threads import WARP, Step
from fusetune.sim.ptx.types import Array, Value

_BITS = np.uint64(1) << np.arange(WARP, dtype=np.uint64)


def _members(m: Machine, mask: Value) -> Array:
    """[warps, 32] threads that a membermask names and that execute the instruction."""
    m.require_converged(mask)
    named = (m.spread(mask).reshape(-1, WARP).astype(np.uint64) & _BITS).astype(np.bool_)
    return named if m.mask is None else named & m.mask.reshape(-1, WARP)


def _per_thread(value: Value) -> Array:
    return np.repeat(value, WARP)


@instruction("shfl")
def shuffle(x: Operation) -> Step:
    """d|p = a of the thread that b names; p: whether it is within the segment that c sets."""
    x.modifiers.last_type({"b32"})
    x.modifiers.required("sync")
    mode = x.modifiers.required("bfly", "up", "down", "idx")
    targets, a, b, c, members = x.operands(5)
    first, second = x.pair(targets)
    read, read_b, read_c = x.read(a, "b32"), x.read(b, "u32"), x.read(c, "u32")
    read_members = x.read(members, "u32")
    write = x.write(first, "b32")
    write_valid = x.write(second, "pred") if second else None
    m = x.machine

    def step() -> None:
        m.require_converged(read_members())
        value = m.spread(read())
        by = (read_b() & np.uint32(31)).astype(np.int64)
        control = read_c().astype(np.int64)
        segment = (control >> 8) & 31
        clamp = control & 31
        low = m.lane & segment
        high = low | (clamp & ~segment)
        if mode == "up":
            source = m.lane - by
            valid = source >= high
        else:
            if mode == "down":
                source = m.lane + by
            elif mode == "bfly":
                source = m.lane ^ by
            else:
                source = low | (by & ~segment)
            valid = source <= high
        if not valid.all():
            source = np.where(valid, source, m.lane)
        origin = m.warp_start + source
        if m.mask is not None and (m.mask & ~m.mask[origin]).any():
            raise SimError("shfl reads a thread that does not take part")
        write(value[origin])
        if write_valid is not None:
            write_valid(valid)

    return step


@instruction("vote")
def vote(x: Operation) -> Step:
    ballot = x.modifiers.flag("ballot")
    x.modifiers.last_type({"b32"} if ballot else {"pred"})
    x.modifiers.required("sync")
    mode = "ballot" if ballot else x.modifiers.required("all", "any", "uni")
    target, a, members = x.operands(3)
    read, read_members = x.read(a, "pred"), x.read(members, "u32")
    write = x.write(target, "b32" if ballot else "pred")
    m = x.machine

    def step() -> None:
        taking_part = _members(m, read_members())
        holds = m.spread(read()).reshape(-1, WARP) & taking_part
        if ballot:
            write(_per_thread((holds * _BITS).sum(1).astype(np.uint32)))
            return
        some, every = holds.any(1), (holds | ~taking_part).all(1)
        write(_per_thread({"any": some, "all": every, "uni": every | ~some}[mode]))

    return step


@instruction("match")
def match(x: Operation) -> Step:
    """The threads that have the same value; `all`: whether all have."""
    kind = x.modifiers.last_type({"b32", "b64"})
    x.modifiers.required("sync")
    mode = x.modifiers.required("any", "all")
    targets, a, members = x.operands(3)
    first, second = x.pair(targets)
    read, read_members = x.read(a, kind), x.read(members, "u32")
    write = x.write(first, "b32")
    write_all = x.write(second, "pred") if second else None
    m = x.machine

    def step() -> None:
        taking_part = _members(m, read_members())
        value = m.spread(read()).reshape(-1, WARP)
        same = (value[:, :, None] == value[:, None, :]) & taking_part[:, None, :]
        masks = (same * _BITS).sum(2).astype(np.uint32)
        if mode == "any":
            write(masks.reshape(-1))
            return
        every = (same | ~taking_part[:, None, :]).all(2)
        write(np.where(every, masks, np.uint32(0)).reshape(-1))
        if write_all is not None:
            write_all(every.reshape(-1))

    return step


_REDUCTIONS: dict[str, Any] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@instruction("redux")
def redux(x: Operation) -> Step:
    kind = x.modifiers.last_type({"s32", "u32", "b32"})
    x.modifiers.required("sync")
    mode = x.modifiers.required(*_REDUCTIONS)
    target, a, members = x.operands(3)
    read, read_members, write = x.read(a, kind), x.read(members, "u32"), x.write(target, kind)
    m = x.machine

    def step() -> None:
        taking_part = _members(m, read_members())
        value = m.spread(read()).reshape(-1, WARP)
        neutral = value.dtype.type({"and": -1 & (1 << 32) - 1}.get(mode, 0))
        if mode in ("min", "max"):  # a member's value stands in for the absent
            neutral = value[np.arange(len(value)), taking_part.argmax(1)][:, None]
        present = np.where(taking_part, value, neutral)
        write(_per_thread(_REDUCTIONS[mode].reduce(present, axis=1, dtype=value.dtype)))

    return step


@instruction("activemask")
def active_mask(x: Operation) -> Step:
    x.modifiers.last_type({"b32"})
    write, m = x.write(x.operands(1)[0], "b32"), x.machine
    return lambda: write(_per_thread((_active(m) * _BITS).sum(1).astype(np.uint32)))


@instruction("elect")
def elect(x: Operation) -> Step:
    """One thread of the warp is chosen: the lowest that takes part."""
    x.modifiers.required("sync")
    targets, members = x.operands(2)
    chosen, leader = x.pair(targets)
    read_members = x.read(members, "u32")
    write = x.write(chosen, "b32")
    write_leader = x.write(leader or "_", "pred")
    m = x.machine

    def step() -> None:
        lowest = _per_thread(_members(m, read_members()).argmax(1))
        write(lowest.astype(np.uint32))
        write_leader(m.lane == lowest)

    return step


def _active(m: Machine) -> Array:
    mask = np.ones(m.lanes, np.bool_) if m.mask is None else m.mask
    return mask.reshape(-1, WARP)
