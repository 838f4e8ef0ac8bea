"""The least time of a launch or an operator on a card, by the resource that binds it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from benchmarks import cards
from benchmarks.cards import Card
from benchmarks.ledgers import Operator
from benchmarks.recorder import Work


class Bound(NamedTuple):
    """A launch on a card: bytes, and seconds by resource."""

    name: str
    memory: int
    seconds: dict[str, float]

    @property
    def resource(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def time(self) -> float:
        return self.seconds[self.resource]


def bound(work: Work, card: Card) -> Bound:
    """The least time of one launch by each resource."""
    seconds = {
        "memory": work.memory / card.memory,
        "tensor cores": work.tensor_flops / card.tensor,
        "fp32 units": work.fp32_flops / card.fp32,
        "L1": work.sectors / card.per_clock(cards.L1_SECTORS),
        "shuffles": work.shuffles / card.per_clock(cards.SHUFFLES),
        "special functions": work.special / card.per_clock(cards.SPECIAL),
    }
    instructions = work.instructions
    if work.anywhere or card.arch not in (90, 100):
        seconds["shared memory"] = work.wavefronts / card.per_clock(cards.WAVEFRONTS)
    else:
        instructions -= work.matrix_instructions
    seconds["issue slots"] = instructions / card.per_clock(cards.ISSUE)
    return Bound(work.name, work.memory, seconds)


def of_operator(operator: Operator, card: Card) -> Bound:
    """The least time of an operator whose kernel is not known: by memory and tensor cores only."""
    seconds = {"memory": operator.bytes / card.memory, "tensor cores": operator.flops / card.tensor}
    return Bound(operator.name, operator.bytes, seconds)


def ledger(operators: Iterable[Operator], card: Card) -> dict[str, float]:
    """Bytes and seconds of operators."""
    moved, took = total(of_operator(operator, card) for operator in operators)
    return {"bytes": moved, "seconds": took}


def total(bounds: Iterable[Bound]) -> tuple[int, float]:
    """(bytes, seconds) of all."""
    bounds = list(bounds)
    return sum(b.memory for b in bounds), sum(b.time for b in bounds)


def apart(bounds: Iterable[Bound]) -> float:
    """Seconds if the two resources that a launch uses longest do not overlap at all."""
    return sum(sum(sorted(b.seconds.values())[-2:]) for b in bounds)


def described(b: Bound) -> dict[str, Any]:
    """As it is written to a file."""
    seconds = {name: value for name, value in b.seconds.items() if value > 0}
    return {"name": b.name, "bytes": b.memory, "binds": b.resource, "seconds": seconds}


def least_time(launch: dict[str, Any]) -> float:
    """Seconds of a launch as `described`."""
    return float(max(launch["seconds"].values()))
