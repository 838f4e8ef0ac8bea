"""Global and local memory of a launch, and what may be done to them; shared_memory.py has the rest.

Device addresses are host addresses: a kernel reads and writes the tensors in place. Every access
is checked against the regions that the launch was given before it is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fusetune.sim.errors import OutOfBounds, SimError
from fusetune.sim.ptx import traffic
from fusetune.sim.ptx.access import (
    HOST,
    LOCAL_WINDOW,
    PAGE,
    SHARED_WINDOW,
    gather,
    offsets_in_window,
    require_agreement,
    scatter,
)
from fusetune.sim.ptx.fault import Fault
from fusetune.sim.ptx.types import Array, Value

if TYPE_CHECKING:
    from fusetune.sim.ptx.machine import Machine
    from fusetune.sim.ptx.shared_memory import SharedMemory
    from fusetune.sim.ptx.trace import Trace


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
        self.trace: Trace | None = None  # where accesses are noted

    def load(self, m: Machine, address: Array, dtype: np.dtype[Any], count: int) -> list[Array]:
        size = dtype.itemsize * count
        address = self._checked(m, address, size, "load")
        requests, sectors = self._traffic(m, address, stored=False)
        m.counts.global_load_requests += requests
        m.counts.global_load_sectors += sectors
        m.counts.global_load_bytes += m.active * size
        return gather(HOST, address - PAGE, dtype, count)

    def store(self, m: Machine, address: Array, values: list[Value]) -> None:
        size = values[0].dtype.itemsize * len(values)
        address = self._checked(m, address, size, "store")
        requests, sectors = self._traffic(m, address, stored=True)
        m.counts.global_store_requests += requests
        m.counts.global_store_sectors += sectors
        m.counts.global_store_bytes += m.active * size
        scatter(HOST, address - PAGE, values, m.mask)
        if m.check:
            require_agreement(m, HOST, address - PAGE, values)

    def atomic(self, m: Machine, address: Array, size: int) -> tuple[Array, Array]:
        """(memory, byte offsets in it) for a read-modify-write."""
        address = self._checked(m, address, size, "atomic")
        requests, sectors = self._traffic(m, address, stored=True)
        m.counts.global_store_requests += requests
        m.counts.global_store_sectors += sectors
        m.counts.global_store_bytes += m.active * size
        return HOST, address - PAGE

    def _traffic(self, m: Machine, address: Array, stored: bool) -> tuple[int, int]:
        """(requests, sectors) of an access."""
        if self.trace is not None:
            self.trace.note(address, m.mask, stored)
        return traffic.sectors(address, m.mask)

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
        address, lane = offsets_in_window(m, address, size, self.size)
        if lane is not None:
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
