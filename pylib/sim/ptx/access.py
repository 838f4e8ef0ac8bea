"""How elements move between registers and an array of bytes; the host's memory as such an array."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fusetune.sim.errors import Race
from fusetune.sim.ptx.fault import Fault
from fusetune.sim.ptx.types import UNSIGNED, Array, Value

if TYPE_CHECKING:
    from fusetune.sim.ptx.machine import Machine

# Generic addresses of shared and local memory: above all addresses of the host.
SHARED_WINDOW = 1 << 48
LOCAL_WINDOW = 1 << 49
WINDOW_SIZE = 1 << 32

PAGE = 4096


class _AddressSpace:
    """All memory of the process but the first page, as one array of bytes. Nothing is touched."""

    __array_interface__: ClassVar = {
        "shape": ((1 << 47) - PAGE,),
        "typestr": "|u1",
        "data": (PAGE, False),
        "version": 3,
    }


HOST = np.asarray(_AddressSpace())
# One element of a whole access: 16 bytes are moved as a complex number, which nothing changes.
_WHOLE = {n: np.dtype(f"u{n}") for n in (1, 2, 4, 8)} | {16: np.dtype("c16")}


def offsets_in_window(
    m: Machine, address: Array, size: int, limit: int
) -> tuple[Array, int | None]:
    """Offsets of accesses of `size` bytes to a window of which `limit` bytes are there.

    Those of absent threads are replaced by a valid one. The second is the first thread whose access
    is misaligned or out of bounds, if any.
    """
    offset = address & (WINDOW_SIZE - 1)
    if m.mask is not None:
        offset = np.where(m.mask, offset, offset[m.mask.argmax()])
    wrong = (offset & (size - 1)).astype(np.bool_) | (offset + size > limit)
    return offset, int(wrong.argmax()) if wrong.any() else None


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
