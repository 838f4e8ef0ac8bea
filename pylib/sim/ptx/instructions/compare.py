"""setp: comparisons, also unordered ones, combined with a predicate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fusetune.sim.ptx.instructions.floating import read_numbers
from fusetune.sim.ptx.instructions.registry import instruction
from fusetune.sim.ptx.operation import Operation
from fusetune.sim.ptx.threads import Step
from fusetune.sim.ptx.types import FLOATS, INTEGERS, Value, flush

_ORDER: dict[str, Callable[..., Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED_ORDER = {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
_COMBINE: dict[str, Callable[..., Any]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
_INTEGERS = {name for name in INTEGERS if name[1:] != "8"} | {"b16", "b32", "b64"}
_FLOATS = {*FLOATS, "bf16"}


def _unordered(a: Value, b: Value) -> Value:
    return np.isnan(a) | np.isnan(b)


def _comparison(x: Operation, kind: str) -> Callable[[Value, Value], Value]:
    if kind in _INTEGERS:
        if kind[0] == "u" and (name := x.modifiers.one_of(*_UNSIGNED_ORDER)):
            return _UNSIGNED_ORDER[name]
        return _ORDER[x.modifiers.required(*_ORDER)]
    if x.modifiers.flag("num"):
        return lambda a, b: ~_unordered(a, b)
    if x.modifiers.flag("nan"):
        return _unordered
    if name := x.modifiers.one_of(*(f"{order}u" for order in _ORDER)):
        order = _ORDER[name[:-1]]
        return lambda a, b: order(a, b) | _unordered(a, b)
    name = x.modifiers.required(*_ORDER)
    order = _ORDER[name]
    if name == "ne":  # numpy's is true where a NaN is
        return lambda a, b: order(a, b) & ~_unordered(a, b)
    return order


@instruction("setp")
def setp(x: Operation) -> Step:
    kind = x.modifiers.last_type(_INTEGERS | _FLOATS)
    compare = _comparison(x, kind)
    combined = x.modifiers.one_of(*_COMBINE)
    flushing = kind == "f32" and x.modifiers.flag("ftz")
    targets, a, b, *condition = x.operands(4 if combined else 3)
    first, second = x.pair(targets)
    read_a, read_b = read_numbers(x, a, kind), read_numbers(x, b, kind)
    write = x.write(first, "pred")
    write_opposite = x.write(second, "pred") if second else None
    if not combined and not flushing and not write_opposite:
        return lambda: write(compare(read_a(), read_b()))
    combine = _COMBINE[combined] if combined else None
    holds = x.read(condition[0], "pred") if condition else None

    def step() -> None:
        left, right = read_a(), read_b()
        if flushing:
            left, right = flush(left), flush(right)
        result = compare(left, right)
        opposite = ~result
        if combine is not None and holds is not None:
            other = holds()
            result, opposite = combine(result, other), combine(opposite, other)
        write(result)
        if write_opposite is not None:
            write_opposite(opposite)

    return step
