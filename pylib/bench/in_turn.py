"""Times training steps, or other calls, of several kinds in turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Turns:
    """Seconds of each kind, by round, and what its steps gave; the latter from the warm-up on."""

    seconds: dict[str, list[float]]
    losses: dict[str, list[float]]

    def median(self, kind: str) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds[kind])

    def ratio(self, kind: str, base: str) -> float:
        """How many times longer `kind` takes than `base`: the median over rounds."""
        pairs = zip(self.seconds[kind], self.seconds[base], strict=True)
        return statistics.median(one / other for one, other in pairs)

    def loss_difference(self, kind: str, base: str) -> float:
        """The largest relative difference of two losses of the same round."""
        pairs = zip(self.losses[kind], self.losses[base], strict=True)
        return max(abs(one - other) / abs(other) for one, other in pairs)


def in_turn(
    kinds: Sequence[str],
    step: Callable[[str, int], float],
    rounds: int,
    *,
    around: Callable[[str], AbstractContextManager[Any]] = lambda kind: nullcontext(),
    after: Callable[[], Any] = lambda: None,
) -> Turns:
    """`rounds` of one step of each kind, and one before them that is not timed.

    A round's steps run within a moment of each other, so that a machine that slows down slows all;
    every other round goes backwards: stock, fused, fused, stock, ... step(kind, round) gives the
    loss; `around` is entered and left, and `after` runs at the end of each round, off the clock.
    """
    turns = Turns({kind: [] for kind in kinds}, {kind: [] for kind in kinds})
    for number in range(rounds + 1):
        for kind in kinds if number % 2 == 0 else reversed(kinds):
            with around(kind):
                begin = time.perf_counter()
                loss = step(kind, number)
                elapsed = time.perf_counter() - begin
            turns.losses[kind].append(loss)
            if number:
                turns.seconds[kind].append(elapsed)
        after()
    return turns


def calls_in_turn(runs: dict[str, Callable[[], Any]], rounds: int) -> Turns:
    """`in_turn` of calls that have no loss."""

    def step(kind: str, number: int) -> float:
        runs[kind]()
        return math.nan

    return in_turn(list(runs), step, rounds)
