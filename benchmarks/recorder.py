"""What a call of the ops does on a card, at full size, without the card: launches and operators.

The host code is the real one: it decides for the card's architecture how matrices are cut into
tiles and which way the base matmul takes. Of every launch a few CTAs are executed by the simulator,
and their counts stand for all. torch's own matrix products are counted and not computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cards import Card
from benchmarks.operators import is_bare, is_view, ops_as_without_a_mode, storage_of, tensors
from fusetune import ops
from fusetune.ops import _cuda, _triton
from fusetune.sim import Counts, cuda_sim
from fusetune.sim.ptx import Program
from fusetune.sim.ptx.memory import GlobalMemory
from fusetune.sim.run import accept_cpu_tensors
from fusetune.sim.triton_driver import simulated_driver

Tensor = torch.Tensor
Dim3 = tuple[int, int, int]

SAMPLE = 2  # CTAs in x and in y that are executed; in z, where parts of a sum differ, all
MATRIX = ("mma", "ldmatrix", "cp")
MOVES = ("mov", "cvta")  # of PTX, which has registers without end: most are no instructions
SPECIAL = ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh")


@dataclass
class Work:
    """One kernel launch, or one operator of torch.

    memory: bytes of the tensors it is given, each once, and those twice that it reads before it
    writes them: what has to come from or go to memory.
    sectors and what follows: of all its CTAs; zero for torch's operators, whose kernels are not
    known. anywhere: whether matrix instructions are the same on every newer architecture.
    """

    name: str
    memory: int
    tensor_flops: float = 0
    fp32_flops: float = 0
    sectors: float = 0
    wavefronts: float = 0
    shuffles: float = 0
    special: float = 0
    instructions: float = 0
    matrix_instructions: float = 0  # of these, products and what fetches their operands
    anywhere: bool = True


@contextmanager
def recorded(card: Card) -> Iterator[list[Work]]:
    """Records what ops do with CPU tensors as if on `card`; results are not computed."""
    works: list[Work] = []
    arch = 75 if card.arch == 75 else 80  # what is executed; the host code sees card.arch
    with ExitStack() as stack:
        stack.enter_context(simulated_driver(arch))
        stack.enter_context(cuda_sim(arch))
        stack.enter_context(accept_cpu_tensors("triton"))
        stack.enter_context(ops.use_backend("auto"))
        seen = lambda device=None: card.arch  # noqa: E731
        stack.enter_context(mock.patch.object(_triton, "capability", seen))
        stack.enter_context(mock.patch.object(_cuda, "_capability", seen))
        stack.enter_context(mock.patch.object(Program, "launch", _sampling(works)))
        stack.enter_context(ops_as_without_a_mode())
        stack.enter_context(_Operators(works))
        yield works


def _sampling(works: list[Work]) -> Any:
    launch = Program.launch

    def sampled(
        program: Program, kernel: str, grid: Dim3, block: Dim3, args: Any, smem: int = 0, **how: Any
    ) -> Counts:
        few = min(grid[0], SAMPLE), min(grid[1], SAMPLE), grid[2]
        with _first_accesses() as first:
            counts = launch(
                program, kernel, few, block, args, smem, memory=how.get("memory", ()), check=False
            )
        share = (grid[0] * grid[1]) / (few[0] * few[1])
        tensors = [t for t in (*args, *how.get("memory", ())) if isinstance(t, Tensor)]
        memory = _bytes(tensors) + _bytes([t for t in tensors if _in_place(t, first)])
        works.append(_work(kernel, memory, counts, share))
        return counts

    return sampled


class _Accesses(NamedTuple):
    """Addresses, one of each load and store of a launch, with their places in its order."""

    loads: dict[int, int]
    stores: dict[int, int]


@contextmanager
def _first_accesses() -> Iterator[_Accesses]:
    """Notes where a launch reads and writes, and what first: its scratch memory it writes first."""
    found = _Accesses({}, {})

    def noting(access: Any, noted: dict[int, int]) -> Any:
        def call(memory: GlobalMemory, m: Any, address: Any, *rest: Any) -> Any:
            if m.mask is None or m.mask.any():
                lane = 0 if m.mask is None else m.mask.argmax()
                noted.setdefault(int(address[lane]), len(found.loads) + len(found.stores))
            return access(memory, m, address, *rest)

        return call

    with (
        mock.patch.object(GlobalMemory, "load", noting(GlobalMemory.load, found.loads)),
        mock.patch.object(GlobalMemory, "store", noting(GlobalMemory.store, found.stores)),
    ):
        yield found


def _in_place(tensor: Tensor, found: _Accesses) -> bool:
    """Whether a launch both reads and writes it, and first reads."""
    start, end = tensor.data_ptr(), tensor.data_ptr() + _extent(tensor)
    loads, stores = (
        [at for address, at in noted.items() if start <= address < end] for noted in found
    )
    return bool(loads and stores) and min(loads) < min(stores)


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * (1 + sum((n - 1) * stride for n, stride in sizes))


def _work(kernel: str, memory: int, counts: Counts, share: float) -> Work:
    def issued(*opcodes: str) -> float:
        found = (n for name, n in counts.instructions.items() if name.split(".")[0] in opcodes)
        return share * sum(found)

    return Work(
        readable(kernel),
        memory,
        tensor_flops=share * counts.mma_flops,
        fp32_flops=32 * 2 * issued("fma"),
        sectors=share * counts.global_sectors,
        wavefronts=share * counts.shared_wavefronts,
        shuffles=issued("shfl"),
        special=32 * issued(*SPECIAL),
        instructions=share * counts.warp_instructions - issued(*MOVES),
        matrix_instructions=issued(*MATRIX),
        # Triton takes other matrix instructions where there are; our CUDA code does not.
        anywhere=kernel.startswith("_Z") or not counts.mma_flops,
    )


def readable(kernel: str) -> str:
    """A kernel's name without what the compiler added."""
    from benchmarks.budgets_found import demangled

    return demangled(kernel)[1] if kernel.startswith("_Z") else kernel.removeprefix("_")


def _bytes(tensors: list[Tensor]) -> int:
    return sum({t.data_ptr(): _elements(t) * t.element_size() for t in tensors}.values())


def _elements(tensor: Tensor) -> int:
    """In memory: what is expanded lies there once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(n for n, stride in sizes if stride or not n)


_PRODUCTS = ("mm", "bmm", "addmm", "addmm_")


class _Operators(TorchDispatchMode):
    """Notes the operators that move data. Matrix products give memory of any content."""

    def __init__(self, works: list[Work]) -> None:
        super().__init__()
        self.works = works

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _PRODUCTS:
            return self._product(name, args)
        inputs = tensors((*args, *(kwargs or {}).values()))
        before = [storage_of(t) for t in inputs]
        result = func(*args, **(kwargs or {}))
        outputs = tensors([result])
        given = inputs and outputs and not is_bare(func)
        if given and not is_view(func, before, outputs):
            size = _bytes(inputs) + _bytes(outputs)
            if max(t.numel() for t in (*inputs, *outputs)) > 1:
                self.works.append(Work(f"torch {name}", size))
        return result

    def _product(self, name: str, args: Any) -> Tensor:
        left, right = args[-2:]
        shape = *left.shape[:-1], right.shape[-1]
        into = args[0] if name == "addmm_" else torch.empty(shape, dtype=left.dtype)
        size = _bytes([left, right]) + _bytes([into])
        if name.startswith("addmm"):
            size += _bytes([args[0]])
        flops = 2.0 * left.numel() * shape[-1]
        work = Work(f"torch {name}", size)
        if left.dtype == torch.float32:
            work.fp32_flops = flops
        else:
            work.tensor_flops = flops
        self.works.append(work)
        return into
