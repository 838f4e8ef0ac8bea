"""Global, shared and local memory of a launch, and what may be done to them.

Device addresses are host addresses: a kernel reads and writes the tensors in place. Every access
is checked against the regions that the launch was given before it is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fusetune.sim.errors import OutOfBounds, Race, SimError, Uninitialised
from fusetune.sim.ptx import traffic
from fusetune.sim.ptx.fault import Fault
from fusetune.sim.ptx.types import UNSIGNED, Array, Value

if TYPE_CHECKING:
    from fusetune.sim.ptx.machine import Machine

# Generic addresses of shared and local memory: above all addresses of the host.
SHARED_WINDOW = 1 << 48
LOCAL_WINDOW = 1 << 49
WINDOW_SIZE = 1 << 32

_PAGE = 4096


class _AddressSpace:
    """All memory of the process but the first page, as one array of bytes. Nothing is touched."""

    __array_interface__: ClassVar = {
        "shape": ((1 << 47) - _PAGE,),
        "typestr": "|u1",
        "data": (_PAGE, False),
        "version": 3,
    }


HOST = np.asarray(_AddressSpace())
# One element of a whole access: 16 bytes are moved as a complex number, which nothing changes.
_WHOLE = {n: np.dtype(f"u{n}") for n in (1, 2, 4, 8)} | {16: np.dtype("c16")}


def gather(memory: Array, at: Array, dtype: np.dtype[Any], count: int) -> list[Array]:
    """`count` elements of each thread, from byte offsets `at` [threads] that are aligned."""
    size = dtype.itemsize * count
    if count == 1:
        return [memory.view(dtype).take(at // size)]
    if size <= 16:
        whole = memory.view(_WHOLE[size])[at // size]
        parts = whole.view(dtype).reshape(len(at), count)
        return [parts[:, i] for i in range(count)]
    first = at // dtype.itemsize
    return [memory.view(dtype)[first + i] for i in range(count)]


def scatter(memory: Array, at: Array, values: list[Value], mask: Array | None) -> None:
    """The converse of `gather`, for the threads in mask."""
    dtype = values[0].dtype
    count, size = len(values), len(values) * dtype.itemsize
    if mask is not None:
        at = at[mask]
        values = [v[mask] if v.ndim else v for v in values]
    if count == 1:
        memory.view(dtype)[at // size] = values[0]
        return
    if size <= 16:
        parts = np.empty((len(at), count), dtype)
        for i, value in enumerate(values):
            parts[:, i] = value
        memory.view(_WHOLE[size])[at // size] = parts.view(_WHOLE[size])[:, 0]
        return
    first = at // dtype.itemsize
    for i, value in enumerate(values):
        memory.view(dtype)[first + i] = value


def held(m: Machine, memory: Array, at: Array, values: list[Value]) -> Array:
    """For each thread, whether its values are what memory holds."""
    bits = UNSIGNED[values[0].dtype.itemsize]
    same = np.ones(m.lanes, np.bool_)
    for value, found in zip(values, gather(memory, at, bits, len(values)), strict=True):
        same &= np.broadcast_to(value, m.lanes).view(bits) == found
    return same


def require_agreement(m: Machine, memory: Array, at: Array, values: list[Value]) -> None:
    """After a store: threads that have stored to one place must have stored the same."""
    same = held(m, memory, at, values)
    if m.mask is not None:
        same |= ~m.mask
    if not same.all():
        raise Fault(Race, "threads store different values to one place", int(same.argmin()))


@dataclass(frozen=True)
class Region:
    """Memory of one tensor: its elements, not the gaps between them."""

    start: int
    end: int
    element: int  # bytes
    dims: tuple[tuple[int, int], ...] = ()  # (length, stride in bytes), longest stride first

    @staticmethod
    def of(tensor: Any) -> Region | None:
        """Of a tensor on the CPU or a numpy array; None where it has no elements."""
        if isinstance(tensor, np.ndarray):
            start, element, strides = tensor.ctypes.data, tensor.itemsize, tensor.strides
        else:
            start, element = tensor.data_ptr(), tensor.element_size()
            strides = tuple(s * element for s in tensor.stride())
        shape = tuple(tensor.shape)
        if 0 in shape:
            return None
        dims = sorted(
            ((n, s) for n, s in zip(shape, strides, strict=True) if n > 1 and s),
            key=lambda dim: -dim[1],
        )
        end = start + sum((n - 1) * s for n, s in dims) + element
        dense = element
        for length, stride in reversed(dims):
            if stride != dense:
                return Region(start, end, element, tuple(dims))
            dense *= length
        return Region(start, end, element)

    def contains(self, address: Array, size: int) -> Array:
        """Whether accesses of `size` bytes lie within."""
        inside: Array = (address >= self.start) & (address + size <= self.end)
        if not self.dims or not inside.any():
            return inside
        for begin in range(0, size, self.element):
            rest = address - self.start + begin
            for length, stride in self.dims:
                rest = rest - np.minimum(rest // stride, length - 1) * stride
            inside &= rest < self.element
        return inside


class GlobalMemory:
    """The tensors and module variables that a launch may touch."""

    def __init__(self, regions: list[Region]) -> None:
        self.regions = regions

    def load(self, m: Machine, address: Array, dtype: np.dtype[Any], count: int) -> list[Array]:
        size = dtype.itemsize * count
        address = self._checked(m, address, size, "load")
        requests, sectors = traffic.sectors(address, m.mask)
        m.counts.global_load_requests += requests
        m.counts.global_load_sectors += sectors
        m.counts.global_load_bytes += m.active * size
        return gather(HOST, address - _PAGE, dtype, count)

    def store(self, m: Machine, address: Array, values: list[Value]) -> None:
        size = values[0].dtype.itemsize * len(values)
        address = self._checked(m, address, size, "store")
        requests, sectors = traffic.sectors(address, m.mask)
        m.counts.global_store_requests += requests
        m.counts.global_store_sectors += sectors
        m.counts.global_store_bytes += m.active * size
        scatter(HOST, address - _PAGE, values, m.mask)
        if m.check:
            require_agreement(m, HOST, address - _PAGE, values)

    def atomic(self, m: Machine, address: Array, size: int) -> tuple[Array, Array]:
        """(memory, byte offsets in it) for a read-modify-write."""
        address = self._checked(m, address, size, "atomic")
        requests, sectors = traffic.sectors(address, m.mask)
        m.counts.global_store_requests += requests
        m.counts.global_store_sectors += sectors
        m.counts.global_store_bytes += m.active * size
        return HOST, address - _PAGE

    def _checked(self, m: Machine, address: Array, size: int, what: str) -> Array:
        """The addresses; those of absent threads replaced by one that may be accessed."""
        if m.mask is not None:
            address = np.where(m.mask, address, address[m.mask.argmax()])
        low, high = int(address.min()), int(address.max()) + size
        misaligned = address & (size - 1)
        if misaligned.any():
            lane = int(misaligned.astype(bool).argmax())
            raise Fault(
                OutOfBounds, f"misaligned global {what} of {size} bytes at {address[lane]:#x}", lane
            )
        for region in self.regions:
            if region.start <= low and high <= region.end and not region.dims:
                return address
        inside = np.zeros(len(address), np.bool_)
        for region in self.regions:
            inside |= region.contains(address, size)
        if not inside.all():
            lane = int(inside.argmin())
            raise Fault(
                OutOfBounds,
                f"global {what} of {size} bytes out of bounds: {self._where(int(address[lane]))}",
                lane,
            )
        return address

    def _where(self, address: int) -> str:
        regions = [r for r in self.regions if r.start <= address]
        if not regions:
            return f"{address:#x} is below all memory of the launch"
        region = max(regions, key=lambda r: r.start)
        return f"byte {address - region.start} of a tensor of {region.end - region.start} bytes"


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
        address = address & (WINDOW_SIZE - 1)
        if m.mask is not None:
            address = np.where(m.mask, address, address[m.mask.argmax()])
        wrong = (address & (size - 1)).astype(np.bool_) | (address + size > self.size)
        if wrong.any():
            lane = int(wrong.argmax())
            offset = int(address[lane])
            problem = "misaligned" if offset % size else "out of bounds"
            raise Fault(
                OutOfBounds,
                f"{problem} shared {what} of {size} bytes at {offset} of {self.size}",
                lane,
            )
        return address + m.cta * self.size


class LocalMemory:
    """Every thread's own memory: arrays and spilled registers."""

    def __init__(self, lanes: int, size: int) -> None:
        self.size = size
        self._data = np.zeros(lanes * size // 16 + 1, np.complex128).view(np.uint8)

    def load(self, m: Machine, address: Array, dtype: np.dtype[Any], count: int) -> list[Array]:
        at = self._checked(m, address, dtype.itemsize * count, "load")
        return gather(self._data, at, dtype, count)

    def store(self, m: Machine, address: Array, values: list[Value]) -> None:
        at = self._checked(m, address, values[0].dtype.itemsize * len(values), "store")
        scatter(self._data, at, values, m.mask)

    def atomic(self, m: Machine, address: Array, size: int) -> tuple[Array, Array]:
        raise SimError("an atomic on local memory")

    def _checked(self, m: Machine, address: Array, size: int, what: str) -> Array:
        address = address & (WINDOW_SIZE - 1)
        if m.mask is not None:
            address = np.where(m.mask, address, address[m.mask.argmax()])
        wrong = (address & (size - 1)).astype(np.bool_) | (address + size > self.size)
        if wrong.any():
            lane = int(wrong.argmax())
            raise Fault(
                OutOfBounds,
                f"local {what} of {size} bytes at {int(address[lane])} of {self.size}",
                lane,
            )
        return address + m.thread_index * self.size


def space_of(m: Machine, address: Array) -> GlobalMemory | SharedMemory | LocalMemory:
    """Which memory generic addresses are in; all active threads must mean the same one."""
    active = address if m.mask is None else address[m.mask]
    low, high = int(active.min()), int(active.max())
    if high < SHARED_WINDOW:
        return m.memory
    if low >= LOCAL_WINDOW:
        return m.local
    if low >= SHARED_WINDOW and high < LOCAL_WINDOW:
        return m.shared
    raise SimError("generic addresses of different state spaces in one instruction")
