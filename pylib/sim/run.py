"""What a simulation hands to its user: the launches, in order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module

from fusetune.sim.counts import Counts
from fusetune.sim.ptx.trace import Trace

Dim3 = tuple[int, int, int]


@dataclass
class Launch:
    """One kernel launch that was executed."""

    kernel: str
    grid: Dim3
    block: Dim3
    counts: Counts
    trace: Trace | None = None  # of a run that was traced


@dataclass
class Run:
    """The launches since the simulation began."""

    arch: int
    launches: list[Launch] = field(default_factory=list)

    def counts(self) -> Counts:
        """All launches together."""
        total = Counts()
        for launch in self.launches:
            total.add(launch.counts)
        return total


@contextmanager
def accept_cpu_tensors(backend: str) -> Iterator[None]:
    """Forces a GPU backend of the ops and lets it take tensors on the CPU."""
    from fusetune.ops import _registry

    devices: set[str] = import_module(f"fusetune.ops._{backend}").DEVICES
    with ExitStack() as stack:
        if "cpu" not in devices:
            devices.add("cpu")
            stack.callback(devices.discard, "cpu")
        stack.enter_context(_registry.use_backend(backend))
        yield
