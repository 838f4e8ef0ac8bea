"""Asynchronous copies from global to shared memory that are under way.

A copy may write as early as it is issued and as late as it is waited for. So targets are checked
for races with earlier accesses at the issue, count as undefined until the wait, and are written
(and checked once more) there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fusetune.sim.ptx.types import Array, Value

if TYPE_CHECKING:
    from fusetune.sim.ptx.machine import Machine


@dataclass
class _Copy:
    group: Array  # [threads] number of the group of each thread that the copy belongs to
    pending: Array  # [threads] who has not waited for it yet
    at: Array  # [threads] where in shared memory
    values: list[Value]


class Copies:
    def __init__(self, m: Machine) -> None:
        self._m = m
        self._pending: list[_Copy] = []
        self._group = np.zeros(m.lanes, np.int32)  # number of each thread's open group

    def issue(self, at: Array, values: list[Value]) -> None:
        mask = self._m.mask
        everyone = np.ones(self._m.lanes, np.bool_) if mask is None else mask.copy()
        self._pending.append(_Copy(self._group.copy(), everyone, at, values))

    def commit(self) -> None:
        """Closes the group of the threads in the mask."""
        self._group += 1 if self._m.mask is None else self._m.mask

    def wait(self, groups: int | None) -> None:
        """Threads in the mask wait until at most so many groups are under way; None: for all."""
        m = self._m
        outer = m.mask
        still = []
        for copy in self._pending:
            done = copy.pending if outer is None else copy.pending & outer
            if groups is not None:
                done = done & (copy.group < self._group - groups)
            if done.any():
                m.mask = None if done.all() else done
                try:
                    m.shared.end_copy(m, copy.at, copy.values)
                finally:
                    m.mask = outer
                copy.pending &= ~done
            if copy.pending.any():
                still.append(copy)
        self._pending = still
