"""The threads of a batch of CTAs, as numpy arrays: their indices, registers and masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fusetune.sim.errors import Uninitialised
from fusetune.sim.ptx.fault import Fault, NotConverged
from fusetune.sim.ptx.types import DTYPES, Array, Value

WARP = 32
Step = Callable[[], None]
Dim3 = tuple[int, int, int]

SPECIAL = frozenset(
    {f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"}
    | {"%laneid", "%warpid", "%lanemask_eq", "%lanemask_lt"}
)


class Threads:
    """What the threads are and hold.

    Instructions are closures over this; they find in `mask` the threads that execute them (None:
    all), and in `regs` the registers. Arrays in `regs` are never written to.
    """

    def __init__(self, names: Sequence[str], kinds: Mapping[str, str], arbitrary: set[str]) -> None:
        self.names = names  # of the registers
        self._arbitrary = [(i, DTYPES[kinds[n]]) for i, n in enumerate(names) if n in arbitrary]

    def place(self, ctas: Array, grid: Dim3, block: Dim3) -> None:
        """Makes the threads of CTAs (their linear indices), with registers not written yet."""
        threads = block[0] * block[1] * block[2]
        self.per_cta = per = -(-threads // WARP) * WARP  # with those that fill the last warp
        self.grid, self.block = grid, block
        self.lanes = lanes = len(ctas) * per
        self.thread_index = np.arange(lanes)
        self.cta = self.thread_index // per  # index in the batch
        self.cta_id = np.repeat(ctas, per)
        self.thread = self.thread_index % per
        self.lane = self.thread_index % WARP
        self.warp_start = self.thread_index - self.lane
        self._warp = (self.thread // WARP).astype(np.int32)
        self._special: dict[str, Value] = {}
        self.regs: list[Value | None] = [None] * len(self.names)
        self._partly: dict[int, Array] = {}  # registers that only these threads have written
        self._live: Array | None = None if threads == per else self.thread < threads
        self._set_mask(self._live)
        for register, dtype in self._arbitrary:  # something that does not go unnoticed
            ones = b"\x01" if dtype == np.bool_ else b"\xff" * dtype.itemsize
            self.regs[register] = np.frombuffer(ones, dtype)[0]

    def special(self, name: str) -> Value:
        """A special register, one of SPECIAL."""
        if name not in self._special:
            self._special[name] = self._make_special(name)
        return self._special[name]

    def _make_special(self, name: str) -> Value:
        base, _, axis = name.partition(".")
        if base in ("%tid", "%ctaid", "%ntid", "%nctaid"):
            i = "xyz".index(axis)
            size = self.block if base in ("%tid", "%ntid") else self.grid
            if base in ("%ntid", "%nctaid"):
                return np.uint32(size[i])
            index = self.thread if base == "%tid" else self.cta_id
            below = size[0] ** (i > 0) * size[1] ** (i > 1)
            return (index // below % size[i]).astype(np.uint32)
        if name == "%laneid":
            return self.lane.astype(np.uint32)
        if name == "%warpid":
            return self._warp.astype(np.uint32)
        own = np.uint64(1) << self.lane.astype(np.uint64)
        if name == "%lanemask_eq":
            return own.astype(np.uint32)
        return (own - np.uint64(1)).astype(np.uint32)  # %lanemask_lt

    # ---- registers ------------------------------------------------------------------------------

    def raise_unless_written(self, register: int) -> None:
        """For a register that some threads or none have written."""
        written = self._partly.get(register)
        if self.regs[register] is None:
            written = np.zeros(self.lanes, np.bool_)
        if written is None:
            return
        missing = ~written if self.mask is None else self.mask & ~written
        if missing.any():
            name = self.names[register].partition("@")[0]
            raise Fault(Uninitialised, f"{name} was never written", int(missing.argmax()))

    def put(self, register: int, value: Value) -> None:
        """Writes a register in the threads of the mask."""
        mask = self.mask
        if mask is None or mask is self._live:  # nobody reads what exited threads have
            self.regs[register] = value
            if register in self._partly:
                del self._partly[register]
            return
        old = self.regs[register]
        if old is None:
            self._partly[register] = mask
            self.regs[register] = np.where(mask, value, value.dtype.type(0))
            return
        if register in self._partly:
            self._partly[register] = self._partly[register] | mask
        if old.dtype is not value.dtype:
            old = old.view(value.dtype)
        self.regs[register] = np.where(mask, value, old)

    def is_partly(self, register: int) -> bool:
        return register in self._partly

    def move(self, source: int, target: int) -> None:
        """Copies a register, also one that was not written: only its use is an error."""
        value = self.regs[source]
        written = self._partly.get(source)
        if value is None:
            written = np.zeros(self.lanes, np.bool_)
            value = np.zeros(self.lanes, np.uint8)
        if written is None:
            self.put(target, value)
            return
        before = self._partly.get(target)
        if before is None:
            before = np.full(self.lanes, self.regs[target] is not None)
        if self.regs[source] is not None:
            self.put(target, value)
        here = self.mask if self.mask is not None else np.ones(self.lanes, np.bool_)
        self._partly[target] = np.where(here, written, before)

    def spread(self, value: Value) -> Array:
        """One element for each thread, contiguous."""
        if value.ndim == 0:
            return np.full(self.lanes, value)
        return np.ascontiguousarray(value)

    # ---- masks ----------------------------------------------------------------------------------

    def _set_mask(self, mask: Array | None) -> None:
        self.mask = mask
        if mask is None:
            self.active = self.lanes
            self.warps = self.lanes // WARP
        else:
            self.active = int(np.count_nonzero(mask))
            self.warps = int(np.count_nonzero(mask.reshape(-1, WARP).any(1)))

    def guarded(self, step: Step, guard: int, negated: bool) -> Step:
        """A step that only the threads execute whose predicate holds."""

        def run() -> None:
            holds: Any = self.regs[guard]
            if holds is None or guard in self._partly:
                self.raise_unless_written(guard)
            if negated:
                holds = ~holds
            if holds.all():
                step()
                return
            outer, active, warps = self.mask, self.active, self.warps
            mask = holds if outer is None else outer & holds
            if not mask.any():
                return
            self._set_mask(mask)
            try:
                step()
            finally:
                self.mask, self.active, self.warps = outer, active, warps

        return run

    def require_converged(self, members: Value) -> None:
        """All threads of a warp that a warp-wide instruction names must be executing it."""
        if self.mask is None or self.mask is self._live:
            return
        bit = (members.astype(np.uint64) >> self.lane.astype(np.uint64)) & np.uint64(1)
        missing = bit.astype(np.bool_) & ~self.mask
        if self._live is not None:
            missing &= self._live
        active_warps = self.mask.reshape(-1, WARP).any(1)
        if (missing.reshape(-1, WARP).any(1) & active_warps).any():
            raise NotConverged
