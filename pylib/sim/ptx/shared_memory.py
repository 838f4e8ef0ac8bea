"""Shared memory of a launch, in which races and reads of what was never written are found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fusetune.sim.errors import OutOfBounds, Race, Uninitialised
from fusetune.sim.ptx import traffic
from fusetune.sim.ptx.access import (
    gather,
    held,
    offsets_in_window,
    require_agreement,
    scatter,
)
from fusetune.sim.ptx.fault import Fault
from fusetune.sim.ptx.types import Array, Value

if TYPE_CHECKING:
    from fusetune.sim.ptx.machine import Machine

_WRITTEN = np.uint8(1)
_IN_FLIGHT = np.uint8(2)  # by a cp.async that has not been waited for
_ALL_WRITTEN = {n: np.dtype(f"u{n}").type(int("01" * n, 16)) for n in (1, 2, 4, 8)}
LARGEST_GRANULE = 16  # no access is larger
_MANY = 63  # in place of a warp: several


class SharedMemory:
    """Shared memory of a batch of CTAs, with what is known about every byte of it.

    A race is a write and another access of the same place by two warps of a CTA with no barrier
    between them. Threads of one warp are taken to run in lockstep. Places are as large as the
    smallest access of the kernel (`granule` bytes).
    """

    def __init__(self, ctas: int, size: int, granule: int, check: bool) -> None:
        self.size = size
        self.check = check
        self._data = np.zeros(ctas * size // 16 + 1, np.complex128).view(np.uint8)
        self._state = np.zeros(len(self._data), np.uint8)
        self._shift = granule.bit_length() - 1
        places = len(self._data) // granule
        # Who has last accessed a place, and when: epoch * 64 + warp.
        self._writer = np.zeros(places, np.int32)
        self._reader = np.zeros(places, np.int32)

    def load(self, m: Machine, address: Array, dtype: np.dtype[Any], count: int) -> list[Array]:
        size = dtype.itemsize * count
        at = self._checked(m, address, size, "load")
        requests, waves = traffic.wavefronts(at, size, m.mask)
        m.counts.shared_load_requests += requests
        m.counts.shared_load_wavefronts += waves
        self.note_load(m, at, size)
        return gather(self._data, at, dtype, count)

    def store(self, m: Machine, address: Array, values: list[Value]) -> None:
        size = values[0].dtype.itemsize * len(values)
        at = self._checked(m, address, size, "store")
        requests, waves = traffic.wavefronts(at, size, m.mask)
        m.counts.shared_store_requests += requests
        m.counts.shared_store_wavefronts += waves
        self.note_store(m, at, size, values)
        scatter(self._data, at, values, m.mask)
        if self.check:
            require_agreement(m, self._data, at, values)

    def atomic(self, m: Machine, address: Array, size: int) -> tuple[Array, Array]:
        """(memory, byte offsets in it). To others it is as a load: atomics do not race with one
        another. A load that races with an atomic before it is not found."""
        at = self._checked(m, address, size, "atomic")
        requests, waves = traffic.wavefronts(at, size, m.mask)
        m.counts.shared_store_requests += requests
        m.counts.shared_store_wavefronts += waves
        self.note_load(m, at, size)
        return self._data, at

    def rows(self, m: Machine, address: Array, what: str) -> Array:
        """Byte offsets of the 16-byte rows that ldmatrix and stmatrix name."""
        return self._checked(m, address, 16, what)

    def read_rows(self, m: Machine, at: Array) -> Array:
        """[rows, 8] 16-bit elements."""
        (whole,) = gather(self._data, at, np.dtype("c16"), 1)
        return whole.view(np.uint16).reshape(-1, 8)

    def write_rows(self, at: Array, rows: Array) -> None:
        self._data.view(np.complex128)[at // 16] = rows.view(np.complex128)[:, 0]

    def begin_copy(self, m: Machine, address: Array, size: int) -> Array:
        """A cp.async is issued: it may write from now on. Byte offsets of its targets."""
        at = self._checked(m, address, size, "cp.async")
        requests, waves = traffic.wavefronts(at, size, m.mask)
        m.counts.shared_store_requests += requests
        m.counts.shared_store_wavefronts += waves
        if self.check:
            lanes, places = self._places(m, at, size)
            self._raise_race(m, lanes, self._conflict(m, self._writer, lanes, places), "cp.async")
            self._raise_race(m, lanes, self._conflict(m, self._reader, lanes, places), "cp.async")
            self._mark(at if m.mask is None else at[m.mask], size, _IN_FLIGHT)
        return at

    def end_copy(self, m: Machine, at: Array, values: list[Value]) -> None:
        """The copy has been waited for: it has written at last."""
        self.note_store(m, at, values[0].dtype.itemsize * len(values))
        scatter(self._data, at, values, m.mask)

    def note_load(self, m: Machine, at: Array, size: int) -> None:
        """Checks a load of all threads in the mask, and remembers it."""
        if not self.check:
            return
        word = min(size, 8)
        states = self._state.view(f"u{word}")
        expected = _ALL_WRITTEN[word]
        for begin in range(0, size, word):
            known = states[(at + begin) // word] == expected
            if m.mask is not None:
                known |= ~m.mask
            if not known.all():
                self._raise_unwritten(int(known.argmin()), at, size)
        lanes, places = self._places(m, at, size)
        tag, floor = m.tag[lanes], m.floor[lanes]
        self._raise_race(m, lanes, self._conflict(m, self._writer, lanes, places), "load")
        before = self._reader[places]
        after = np.where((before < floor) | (before == tag), tag, floor | _MANY)
        self._reader[places] = after
        twice = self._reader[places] != after  # another warp reads it in this very instruction
        if twice.any():
            several = np.broadcast_to(floor | _MANY, places.shape)
            self._reader[places[twice]] = several[twice]

    def note_store(
        self, m: Machine, at: Array, size: int, values: list[Value] | None = None
    ) -> None:
        """Checks a store of all threads in the mask, and remembers it.

        Warps that store the same value in the same place do not race: Triton lets all warps that
        hold a copy of a value store it.
        """
        if not self.check:
            return
        self._mark(at if m.mask is None else at[m.mask], size, _WRITTEN)
        lanes, places = self._places(m, at, size)
        self._raise_race(m, lanes, self._conflict(m, self._reader, lanes, places), "store")
        earlier = self._conflict(m, self._writer, lanes, places)
        if values is not None and earlier.any():
            earlier &= ~held(m, self._data, at, values)[lanes]
        self._raise_race(m, lanes, earlier, "store")
        tag = m.tag[lanes]
        self._writer[places] = tag
        if values is None:  # else whether they agree is seen when they are stored
            self._raise_race(m, lanes, self._writer[places] != tag, "store")

    def _mark(self, at: Array, size: int, state: np.uint8) -> None:
        word = min(size, 8)
        pattern = np.frombuffer(bytes([state]) * word, f"u{word}")[0]
        for begin in range(0, size, word):
            self._state.view(f"u{word}")[(at + begin) // word] = pattern

    def _places(self, m: Machine, at: Array, size: int) -> tuple[Any, Array]:
        """(threads that take part, [..., threads] places that each accesses)."""
        lanes: Any = slice(None)
        if m.mask is not None:
            lanes = np.flatnonzero(m.mask)
            at = at[lanes]
        first = at >> self._shift
        count = max(1, size >> self._shift)
        if count == 1:
            return lanes, first
        return lanes, first + np.arange(count)[:, None]

    def _conflict(self, m: Machine, who: Array, lanes: Any, places: Array) -> Array:
        last = who[places]
        conflict: Array = (last >= m.floor[lanes]) & (last != m.tag[lanes])
        return conflict

    def _raise_race(self, m: Machine, lanes: Any, conflict: Array, what: str) -> None:
        if not conflict.any():
            return
        threads = conflict if conflict.ndim == 1 else conflict.any(0)
        lane = int(np.arange(m.lanes)[lanes][threads.argmax()])
        raise Fault(
            Race,
            f"shared-memory race: this {what} and an access of another warp since the last barrier",
            lane,
        )

    def _raise_unwritten(self, lane: int, at: Array, size: int) -> None:
        states = self._state[at[lane] : at[lane] + size]
        if (states == _IN_FLIGHT).any():
            raise Fault(Race, "load of shared memory that a cp.async not waited for writes", lane)
        raise Fault(Uninitialised, "load of shared memory that was never written", lane)

    def _checked(self, m: Machine, address: Array, size: int, what: str) -> Array:
        """Offsets in the batch's memory; those of absent threads replaced by a valid one."""
        address, lane = offsets_in_window(m, address, size, self.size)
        if lane is not None:
            offset = int(address[lane])
            problem = "misaligned" if offset % size else "out of bounds"
            raise Fault(
                OutOfBounds,
                f"{problem} shared {what} of {size} bytes at {offset} of {self.size}",
                lane,
            )
        return address + m.cta * self.size
