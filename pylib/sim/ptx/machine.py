"""Executes one kernel: all threads of a batch of CTAs at once.

Divergent threads run in the order of their program counters, the lowest first, so that they meet
again where the paths join. A barrier holds the threads of a CTA until all have arrived.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fusetune.sim.counts import Counts
from fusetune.sim.errors import Deadlock, Divergence, SimError
from fusetune.sim.ptx.cp_async import Copies
from fusetune.sim.ptx.fault import Fault, NotConverged
from fusetune.sim.ptx.memory import GlobalMemory, LocalMemory
from fusetune.sim.ptx.shared_memory import SharedMemory
from fusetune.sim.ptx.threads import Dim3, Step, Threads
from fusetune.sim.ptx.types import Array, Value

if TYPE_CHECKING:
    from fusetune.sim.ptx.syntax import Instruction

# Instructions that may send threads elsewhere; they end a block.
CONTROL = frozenset({"bra", "ret", "exit", "trap", "bar", "barrier"})


class Machine(Threads):
    """The batch that runs, its memories, and the scheduler."""

    def __init__(
        self, kernel: str, names: Sequence[str], kinds: Mapping[str, str], arbitrary: set[str]
    ) -> None:
        super().__init__(names, kinds, arbitrary)
        self.kernel = kernel
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

    def start(
        self, ctas: Array, grid: Dim3, block: Dim3, shared: int, local: int, granule: int
    ) -> None:
        """Puts the threads of CTAs (their linear indices) at the kernel's first instruction."""
        self.place(ctas, grid, block)
        self.shared = SharedMemory(len(ctas), shared, granule, self.check)
        self.local = LocalMemory(self.lanes, local)
        self._epoch = np.ones(len(ctas), np.int32)
        self._new_epoch(np.zeros(len(ctas), np.bool_))
        self.decoded: dict[Any, Any] = {}  # operands of mma that were decoded in this block
        self.copies = Copies(self)
        self._pc: int | None = 0  # of all live threads; None: they differ, see _pcs
        self._pcs = np.zeros(self.lanes, np.int32)
        self._waiting = np.zeros(self.lanes, np.bool_)  # at a barrier, of this number:
        self._barrier = np.zeros(self.lanes, np.int8)
        self._executed: dict[tuple[int, int], int] = {}

    def _new_epoch(self, opened: Array) -> None:
        self._epoch += opened
        self.floor = np.repeat(self._epoch * 64, self.per_cta)
        self.tag = self.floor + self._warp

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
