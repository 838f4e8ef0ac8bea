"""One GPU kernel at a fixed shape: the entries of gpu_kernels.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from typing import Literal

from benchmarks.gpu_launches import Sizes

Backend = Literal["triton", "cuda"]

FULL = Sizes(4096, 4096, 4096)
SMALL = Sizes(256, 256, 512)

# What several kernels are written for.
WIDE = ("wide loads",)
MATMUL = ("tensor cores", "wide loads")
PIPELINED = ("tensor cores", "asynchronous copies")


@dataclass(frozen=True)
class Case:
    """One kernel in one use of it.

    kernel: its name, of the launches that `call` makes. needs: what has to be among its machine
    instructions, see budgets_found.py; newest: the tensor cores of the newest kind, where an
    architecture has several. small: sizes at which it is executed and counted; it is compiled for
    those of `full`. turing: whether the ops offer it on sm_75. compulsory: the least that it has to
    move at given sizes, in bytes; memory may have to move `within` times that.
    """

    name: str
    backend: Backend
    kernel: str
    call: Callable[[Sizes, int], None]  # sizes, architecture
    needs: tuple[str, ...] = ()
    newest: bool = False
    small: Sizes = SMALL
    full: Sizes = FULL
    turing: bool = True
    compulsory: Callable[[Sizes], int] | None = None
    within: float = inf

    def archs(self, known: Iterable[int]) -> list[int]:
        """Of the architectures, those on which the ops offer it."""
        return [arch for arch in known if arch >= 80 or self.turing]
