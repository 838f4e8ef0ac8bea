"""How the parts of the interpreter report an error to its scheduler, which knows the place."""

from __future__ import annotations

from fusetune.sim.errors import SimError


class Fault(Exception):
    """An error of a thread. The scheduler turns it into `kind`, with kernel, line and thread."""

    def __init__(self, kind: type[SimError], message: str, lane: int) -> None:
        super().__init__(message)
        self.kind = kind
        self.lane = lane  # index of the thread in the batch


class NotConverged(Exception):
    """A warp-wide instruction waits for threads of its warp that are elsewhere."""
