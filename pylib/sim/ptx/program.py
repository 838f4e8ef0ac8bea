"""A loaded PTX module, ready to launch its kernels."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from fusetune.sim.counts import Counts
from fusetune.sim.errors import SimError
from fusetune.sim.ptx.instructions import make
from fusetune.sim.ptx.machine import Machine
from fusetune.sim.ptx.memory import Region
from fusetune.sim.ptx.operation import CARRY, Operation
from fusetune.sim.ptx.shared_memory import LARGEST_GRANULE
from fusetune.sim.ptx.syntax import Instruction, Kernel, Module, Variable, parse
from fusetune.sim.ptx.threads import WARP, Dim3
from fusetune.sim.ptx.trace import THREADS, Trace
from fusetune.sim.ptx.types import DTYPES

_BATCH = 8192  # threads that run at once: more are faster until they leave the caches


class Program:
    """A PTX module. `launch` runs a kernel; kernels are translated at their first launch."""

    def __init__(self, text: str) -> None:
        with _collector_off():
            self._module = parse(text)
        self._variables = _Variables(self._module)
        self._loaded: dict[str, _Loaded] = {}

    @property
    def kernels(self) -> list[str]:
        return list(self._module.kernels)

    def parameters(self, kernel: str) -> list[int]:
        """Sizes in bytes of a kernel's parameters."""
        return [param.size for param in self._kernel(kernel).params]

    def launch(
        self,
        kernel: str,
        grid: Dim3,
        block: Dim3,
        args: Sequence[Any],
        smem: int = 0,
        *,
        memory: Iterable[Any] = (),
        check: bool = True,
        first: int = 0,
        trace: Trace | None = None,
    ) -> Counts:
        """Runs a kernel over its grid, from its CTA number `first` on, and counts what it did.

        args: tensors on the CPU (by address, all that a kernel may touch), numbers, None (a null
        pointer), or the bytes of a parameter; missing ones are null. memory: more tensors that may
        be touched. smem: dynamic shared memory in bytes. check: look for races and for reads of
        shared memory that was never written; bounds are checked always. trace: notes all accesses
        to global memory, of as many CTAs at once as a card runs.
        """
        if min(grid) < 1 or min(block) < 1 or block[0] * block[1] * block[2] > 1024:
            raise SimError(f"cannot launch {kernel} with grid {grid} and block {block}")
        loaded = self._loaded.get(kernel)
        if loaded is None:
            with _collector_off():
                loaded = self._loaded[kernel] = _Loaded(self._kernel(kernel), self._variables)
        m = loaded.machine
        m.check, m.counts, m.memory.trace = check, Counts(), trace
        m.params = loaded.layout(args)
        tensors = [a for a in (*args, *memory) if hasattr(a, "shape") and np.ndim(a) >= 0]
        regions = [Region.of(tensor) for tensor in tensors if not isinstance(tensor, np.generic)]
        m.memory.regions = [r for r in regions if r is not None] + self._variables.regions
        threads = -(-block[0] * block[1] * block[2] // WARP) * WARP
        batch = _BATCH if trace is None else THREADS
        ctas, at_once = grid[0] * grid[1] * grid[2], max(1, batch // threads)
        with np.errstate(all="ignore"):
            for start in range(first, ctas, at_once):
                some = np.arange(start, min(start + at_once, ctas))
                m.start(some, grid, block, loaded.shared + smem, loaded.local, loaded.granule)
                m.run()
        return m.counts

    def _kernel(self, name: str) -> Kernel:
        if name not in self._module.kernels:
            raise SimError(f"no kernel {name!r}; there are {', '.join(self.kernels)}")
        return self._module.kernels[name]


@contextmanager
def _collector_off() -> Iterator[None]:
    """For code that makes many objects and no garbage: collections in between double its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Variables:
    """The module's .global and .const variables: arrays that live as long as the program."""

    def __init__(self, module: Module) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        for variable in module.variables:
            array = np.zeros(-(-max(variable.size, 1) // 16), np.complex128).view(np.uint8)
            array[: len(variable.content)] = np.frombuffer(variable.content, np.uint8)
            self.arrays[variable.name] = array[: variable.size]
        self.addresses = {name: array.ctypes.data for name, array in self.arrays.items()}
        regions = [Region.of(array) for array in self.arrays.values()]
        self.regions = [region for region in regions if region is not None]
        self.shared = module.shared


class _Loaded:
    """A kernel as steps of a machine, and the layout of its memory."""

    def __init__(self, kernel: Kernel, variables: _Variables) -> None:
        self.kernel = kernel
        self.params: dict[str, tuple[int, Variable]] = {}
        self.params_size = _place(kernel.params, self.params)
        symbols = dict(variables.addresses)
        static: dict[str, tuple[int, Variable]] = {}
        named = [v for v in (*variables.shared, *kernel.shared) if v.size]
        self.shared = -(-_place(named, static) // 128) * 128
        symbols.update({name: at for name, (at, _) in static.items()})
        symbols.update({v.name: self.shared for v in variables.shared if not v.size})
        local: dict[str, tuple[int, Variable]] = {}
        self.local = -(-_place(kernel.local, local) // 16) * 16
        symbols.update({name: at for name, (at, _) in local.items()})
        kinds = {**kernel.registers, CARRY: "pred"}
        registers = {name: (i, kind) for i, (name, kind) in enumerate(kinds.items())}
        self.machine = Machine(kernel.name, list(registers), kinds, kernel.arbitrary)
        code = kernel.instructions
        steps = [
            make(Operation(i, self.machine, registers, symbols, self.params, kernel.labels))
            for i in code
        ]
        self.machine.load(code, steps, set(kernel.labels.values()))
        self.granule = min((_shared_access(i) for i in code), default=LARGEST_GRANULE)

    def layout(self, args: Sequence[Any]) -> bytes:
        """The parameters as the kernel finds them in memory."""
        params = self.kernel.params
        if len(args) > len(params):
            raise SimError(f"{len(args)} arguments for {len(params)} of {self.kernel.name}")
        buffer = bytearray(self.params_size)
        for param, arg in zip(params, args, strict=False):
            offset, _ = self.params[param.name]
            buffer[offset : offset + param.size] = _argument(arg, param)
        return bytes(buffer)


def _place(variables: Iterable[Variable], places: dict[str, tuple[int, Variable]]) -> int:
    """Lays variables out one after the other; the size of all."""
    offset = 0
    for variable in variables:
        offset = -(-offset // variable.align) * variable.align
        places[variable.name] = (offset, variable)
        offset += variable.size
    return offset


def _argument(arg: Any, param: Variable) -> bytes:
    if isinstance(arg, (bytes, bytearray)):
        if len(arg) != param.size:
            raise SimError(f"{len(arg)} bytes for {param.name}, which has {param.size}")
        return bytes(arg)
    if isinstance(arg, float):
        return np.array(arg, f"f{param.size}").tobytes()
    if arg is None:
        number = 0
    elif isinstance(arg, np.ndarray):
        number = arg.ctypes.data
    elif hasattr(arg, "data_ptr"):
        number = arg.data_ptr()
    else:
        number = int(arg)
    return (number & ((1 << 8 * param.size) - 1)).to_bytes(param.size, "little")


def _shared_access(instruction: Instruction) -> int:
    """Bytes of the smallest piece of shared memory that the instruction may touch."""
    modifiers = instruction.modifiers
    if instruction.mnemonic == "cp" and len(instruction.operands) > 2:
        return int(instruction.operands[2], 0)
    if instruction.mnemonic not in ("ld", "ldu", "st", "atom", "red"):
        return LARGEST_GRANULE
    if {"global", "param", "const", "local"} & set(modifiers) or modifiers[-1] not in DTYPES:
        return LARGEST_GRANULE
    count = next((int(v[1:]) for v in modifiers if v in ("v2", "v4", "v8")), 1)
    return min(LARGEST_GRANULE, DTYPES[modifiers[-1]].itemsize * count)


__all__ = ["Program"]
