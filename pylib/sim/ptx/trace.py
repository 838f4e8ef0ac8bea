"""Every access of a launch to global memory, and what of it passes through a cache to memory."""

from __future__ import annotations

from collections import OrderedDict

from fusetune.sim.ptx import traffic
from fusetune.sim.ptx.types import Array

# Threads that run at once in a traced launch: 256 on each of 128 multiprocessors. How far apart two
# accesses to one place are depends on it.
THREADS = 32768


class Trace:
    """Sectors in the order of the simulation: of all warps that run at once, one instruction after
    another."""

    def __init__(self) -> None:
        self._accesses: list[tuple[Array, bool]] = []

    def note(self, address: Array, mask: Array | None, stored: bool) -> None:
        """An access of all threads in the mask; `address` [threads]."""
        self._accesses.append((traffic.touched(address, mask), stored))

    def memory_sectors(self, cache: int) -> int:
        """Sectors that a cache of `cache` bytes reads from memory and writes to it.

        The cache is empty at first and written back at the end, is as good as it is large (any
        sector anywhere), and lets go of what was not used for longest. A sector that is stored is
        not read first. With a cache of any size: each loaded sector once, each stored one once.
        """
        room = cache // traffic.SECTOR
        held: OrderedDict[int, bool] = OrderedDict()  # sector: whether memory has to be told
        moved = 0
        for sectors, stored in self._accesses:
            for sector in sectors.tolist():
                changed = held.pop(sector, None)
                if changed is None and not stored:
                    moved += 1
                held[sector] = stored or bool(changed)
                if len(held) > room:
                    moved += held.popitem(last=False)[1]
        return moved + sum(held.values())
