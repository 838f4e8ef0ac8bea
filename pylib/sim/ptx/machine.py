"""Executes one kernel: all threads of a batch of CTAs at once, as numpy arrays.

Divergent threads run in the order of their program counters, the lowest first, so that they meet
again where the paths join. A barrier holds the threads of a CTA until all have arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fusetune.sim.counts import Counts
from fusetune.sim.errors import Deadlock, Divergence, SimError, Uninitialised
from fusetune.sim.ptx.cp_async import Copies
from fusetune.sim.ptx.fault import Fault, NotConverged
from fusetune.sim.ptx.memory import GlobalMemory, LocalMemory
from fusetune.sim.ptx.shared_memory import SharedMemory
from fusetune.sim.ptx.types import DTYPES, Array, Value

if TYPE_CHECKING:
    from fusetune.sim.ptx.syntax import Instruction

WARP = 32
Step = Callable[[], None]
Dim3 = tuple[int, int, int]

# Instructions that may send threads elsewhere; they end a block.
CONTROL = frozenset({"bra", "ret", "exit", "trap", "bar", "barrier"})
SPECIAL = frozenset(
    {f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"}
    | {"%laneid", "%warpid", "%lanemask_eq", "%lanemask_lt"}
)


class Machine:
    """State of the batch that runs, and the scheduler.

    Instructions are closures over the machine; they find in `mask` the threads that execute them
    (None: all), and in `regs` the registers. Arrays in `regs` are never written to.
    """

    def __init__(
        self, kernel: str, names: Sequence[str], kinds: Mapping[str, str], arbitrary: set[str]
    ) -> None:
        self.kernel = kernel
        self.names = names  # of the registers
        self._arbitrary = [(i, DTYPES[kinds[n]]) for i, n in enumerate(names) if n in arbitrary]
        self.check = True
        self.counts = Counts()
        self.params = b""
        self.memory = GlobalMemory([])
        # Set by `load`, for every instruction: the code and the blocks' ends.
        self.steps: list[Step] = []
        self.code: Sequence[Instruction] = ()
        self._ends: list[int] = []

    def load(self, code: Sequence[Instruction], steps: list[Step], labels: set[int]) -> None:
        """Gives the machine its program. labels: instructions that a branch may go to."""
        self.code, self.steps = code, steps
        end = len(code)
        self._ends = [0] * end
        for i in reversed(range(len(code))):
            if i + 1 in labels or code[i].mnemonic in CONTROL:
                end = i + 1
            self._ends[i] = end

    # ---- a batch of CTAs ------------------------------------------------------------------------

    def start(
        self, ctas: Array, grid: Dim3, block: Dim3, shared: int, local: int, granule: int
    ) -> None:
        """Puts the threads of CTAs (their linear indices) at the kernel's first instruction."""
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
        self.shared = SharedMemory(len(ctas), shared, granule, self.check)
        self.local = LocalMemory(lanes, local)
        self._epoch = np.ones(len(ctas), np.int32)
        self._new_epoch(np.zeros(len(ctas), np.bool_))
        self.decoded: dict[Any, Any] = {}  # operands of mma that were decoded in this block
        self.copies = Copies(self)
        self._live: Array | None = None if threads == per else self.thread < threads
        self._pc: int | None = 0  # of all live threads; None: they differ, see _pcs
        self._pcs = np.zeros(lanes, np.int32)
        self._waiting = np.zeros(lanes, np.bool_)  # at a barrier, of this number:
        self._barrier = np.zeros(lanes, np.int8)
        self._executed: dict[tuple[int, int], int] = {}
        self._set_mask(self._live)
        for register, dtype in self._arbitrary:  # something that does not go unnoticed
            ones = b"\x01" if dtype == np.bool_ else b"\xff" * dtype.itemsize
            self.regs[register] = np.frombuffer(ones, dtype)[0]

    def _new_epoch(self, opened: Array) -> None:
        self._epoch += opened
        self.floor = np.repeat(self._epoch * 64, self.per_cta)
        self.tag = self.floor + self._warp

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

    # ---- control --------------------------------------------------------------------------------

    def branch(self, taken: Value | None, target: int) -> None:
        """Sends the threads of the mask where `taken` holds (None: all) to an instruction."""
        if taken is None or taken.ndim == 0:
            if taken is not None and not taken:
                return
            taken = self.mask
        elif self.mask is not None:
            taken = taken & self.mask
        if self._pc is not None:
            here = self._live
            if taken is None or (taken.all() if here is None else (taken == here).all()):
                self._pc = target
                return
            if not taken.any():
                return
            self._pcs[:] = self._pc
            self._pc = None
        self._pcs[slice(None) if taken is None else taken] = target

    def exit(self, taken: Value | None) -> None:
        """Ends the threads of the mask where `taken` holds (None: all)."""
        gone = np.ones(self.lanes, np.bool_) if self.mask is None else self.mask
        if taken is not None:
            gone = gone & taken
        if not gone.any():
            return
        self._live = ~gone if self._live is None else self._live & ~gone

    def arrive(self, taken: Value | None, number: int) -> None:
        """The threads of the mask where `taken` holds wait at a barrier for the others of their
        CTAs. Threads that have exited are not waited for."""
        if taken is not None and not taken.all():
            arrived = taken if self.mask is None else taken & self.mask
            if self._pc is not None:
                self._pcs[:] = self._pc
                self._pc = None
            self._waiting |= arrived
            self._barrier[arrived] = number
            return
        if self._pc is not None:  # nobody else is left to wait for
            self._open(self._ctas_where(self._live))
            return
        where = slice(None) if self.mask is None else self.mask
        self._waiting[where] = True
        self._barrier[where] = number

    def _ctas_where(self, threads: Array | None) -> Array:
        """[ctas] which have a thread among these (None: all)."""
        if threads is None:
            return np.ones(len(self._epoch), np.bool_)
        return np.asarray(threads.reshape(len(self._epoch), -1).any(1))

    def _first_of_cta(self, threads: Array) -> Array:
        """[ctas] index of the first of these threads in each CTA."""
        ctas = len(self._epoch)
        return np.asarray(threads.reshape(ctas, -1).argmax(1)) + np.arange(ctas) * self.per_cta

    def _open(self, opened: Array) -> None:
        self.counts.barriers += int(np.count_nonzero(opened))
        self._new_epoch(opened)

    # ---- the scheduler --------------------------------------------------------------------------

    def run(self) -> None:
        """Runs the batch to its end."""
        parked: Array | None = None  # threads that a warp-wide instruction has sent waiting
        while True:
            if self._live is not None and not self._live.any():
                break
            if self._pc is not None:
                start, mask = self._pc, self._live
            else:
                start, mask, parked = self._pick(parked)
            stop = self._ends[start]
            self._set_mask(mask)
            self.decoded.clear()
            if self._pc is not None:
                self._pc = stop
            else:
                self._pcs[mask] = stop
            done = self._run_block(start, stop)
            key = (start, done)
            self._executed[key] = self._executed.get(key, 0) + self.warps
            if done < stop:
                assert mask is not None
                parked = mask if parked is None else parked | mask
                self._pcs[mask] = done
            elif self._pc is None:
                self._settle()
        self._count_instructions()

    def _run_block(self, start: int, stop: int) -> int:
        """Executes instructions; where it ended: at stop, or at one whose warps are incomplete."""
        steps = self.steps
        at = start
        try:
            for at in range(start, stop):
                steps[at]()
        except NotConverged:
            if self._pc is not None:  # there are no others to wait for
                raise self._located(
                    Divergence, "the instruction names threads that have exited", at, None
                ) from None
            return at
        except Fault as fault:
            raise self._located(fault.kind, str(fault), at, fault.lane) from None
        except SimError as error:
            raise self._located(type(error), str(error), at, None) from None
        return stop

    def _pick(self, parked: Array | None) -> tuple[int, Array, Array | None]:
        """(program counter, threads to run there, threads that stay parked)."""
        ready = ~self._waiting if self._live is None else self._live & ~self._waiting
        if not ready.any():
            lane = int(self._waiting.argmax())
            raise self._located(
                Deadlock, "a barrier that not all threads reach", self._barrier_of(lane), lane
            )
        runnable = ready if parked is None else ready & ~parked
        if not runnable.any():
            assert parked is not None
            lane = int((parked & ready).argmax())
            raise self._located(
                Divergence,
                "a warp-wide instruction names threads that do not arrive at it",
                int(self._pcs[lane]),
                lane,
            )
        pc = int(self._pcs[runnable].min())
        mask = ready & (self._pcs == pc)
        if parked is not None:
            parked = parked & ~mask
        return pc, mask, parked

    def _barrier_of(self, lane: int) -> int:
        return int(self._pcs[lane]) - 1

    def _settle(self) -> None:
        """After a block of divergent threads: opens barriers, and sees who has met again."""
        live = self._live
        if self._waiting.any():
            if live is not None:
                self._waiting &= live
            absent = ~self._waiting if live is None else live & ~self._waiting
            opened = self._ctas_where(self._waiting) & ~self._ctas_where(absent)
            # All of a CTA wait, but at different barriers: none opens.
            first = np.repeat(self._barrier[self._first_of_cta(self._waiting)], self.per_cta)
            opened &= ~self._ctas_where(self._waiting & (self._barrier != first))
            if opened.any():
                self._open(opened)
                self._waiting.reshape(len(opened), -1)[opened] = False
            if self._waiting.any():
                return
        pcs = self._pcs if live is None else self._pcs[live]
        if len(pcs) and (pcs[0] == pcs).all():
            self._pc = int(pcs[0])

    def _count_instructions(self) -> None:
        for (start, stop), warps in self._executed.items():
            for instruction in self.code[start:stop]:
                self.counts.instructions[instruction.opcode] += warps

    def _located(self, kind: type[SimError], message: str, at: int, lane: int | None) -> SimError:
        """The error with kernel, place and thread."""
        instruction = self.code[at]
        where = f" at {instruction.line}" if instruction.line else ""
        who = ""
        if lane is not None:
            x, y = self.grid[0], self.grid[1]
            cta = int(self.cta_id[lane])
            who = (
                f" by thread {lane % self.per_cta} of CTA {(cta % x, cta // x % y, cta // x // y)}"
            )
        return kind(f"{message}; `{instruction.text}`{where}{who} in kernel {self.kernel}")
