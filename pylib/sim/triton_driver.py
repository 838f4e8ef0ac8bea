"""A Triton driver without a GPU: launches compute on CPU tensors, in the PTX interpreter.

Host code (launchers, autotuning, heuristics) runs as it would on a GPU; of several autotuning
configurations the first is taken, for time is not modelled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fusetune.sim.errors import SimError
from fusetune.sim.ptx import Program
from fusetune.sim.ptx.trace import Trace
from fusetune.sim.run import Dim3, Launch, Run, accept_cpu_tensors

# Shared memory in bytes that one CTA may ask for, by architecture (CUDA programming guide).
MAX_SHARED = {
    75: 65536,
    80: 166912,
    86: 101376,
    89: 101376,
    90: 232448,
    100: 232448,
    120: 101376,
}


@contextmanager
def triton_sim(arch: int = 80) -> Iterator[Run]:
    """Executes Triton kernels, compiled for sm_`arch`, on CPU tensors; forces backend "triton"."""
    with simulated_driver(arch) as run, accept_cpu_tensors("triton"):
        yield run


@contextmanager
def simulated_driver(arch: int = 80, traced: bool = False) -> Iterator[Run]:
    """Executes Triton kernels on CPU tensors, whosever they are; nothing of the ops changes.

    traced: every launch has a trace of its accesses to global memory.
    """
    run = Run(arch)

    def execute(kernel: Compiled, grid: Dim3, args: list[Any]) -> None:
        block = (32 * kernel.warps, 1, 1)
        program = _program(kernel.files["ptx"])
        trace = Trace() if traced else None
        counts = program.launch(kernel.name, grid, block, args, smem=kernel.shared, trace=trace)
        run.launches.append(Launch(kernel.name, grid, block, counts, trace))

    with driver_in_place(arch, execute):
        yield run


@lru_cache(maxsize=64)
def _program(path: str) -> Program:
    return Program(Path(path).read_text())


@dataclass(frozen=True)
class Compiled:
    """A kernel that Triton has compiled."""

    name: str
    warps: int
    shared: int  # bytes, dynamic
    files: dict[str, str]  # paths in Triton's cache, by ending: "ptx", "cubin", ...


Execute = Callable[[Compiled, Dim3, list[Any]], None]


@contextmanager
def driver_in_place(arch: int, execute: Execute) -> Iterator[None]:
    """Makes a driver Triton's that hands launches (kernel, grid, parameters) to `execute`."""
    if arch not in MAX_SHARED:
        raise ValueError(f"arch must be one of {sorted(MAX_SHARED)}, got {arch!r}")
    from triton import knobs
    from triton.runtime import driver

    before = driver._active
    driver.set_active(_make_driver(arch, execute))
    knobs.runtime.kernel_load_start_hook.add(_remember_files)
    try:
        yield
    finally:
        driver._active = before


_FILES: dict[str, dict[str, str]] = {}  # of every kernel that was loaded, by Triton's hash


def _remember_files(_module: Any, _function: Any, _name: str, group: Any, key: str) -> None:
    """Triton's hook at the loading of a kernel: group maps file names to their cached paths."""
    _FILES[key] = {name.rpartition(".")[2]: path for name, path in group.items()}


class _Launcher:
    """What Triton calls to launch a compiled kernel.

    It stays in Triton's caches, so it looks for the driver that is active when it is called.
    """

    def __init__(self, src: Any, metadata: Any) -> None:
        self.types = tuple(src.signature.values())
        self.metadata = metadata

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        _stream: int,
        _function: Any,
        _packed: Any,
        launch_metadata: Any,
        enter_hook: Callable[[Any], None] | None,
        exit_hook: Callable[[Any], None] | None,
        *args: Any,
    ) -> None:
        from triton.runtime import driver

        if self.metadata.global_scratch_size:
            raise SimError(f"{self.metadata.name} needs scratch memory, which is not simulated")
        kernel = Compiled(
            self.metadata.name,
            self.metadata.num_warps,
            self.metadata.shared,
            _FILES[self.metadata.hash],
        )
        if enter_hook is not None:
            enter_hook(launch_metadata)
        driver.active.execute(kernel, (x, y, z), _flatten(self.types, args))
        if exit_hook is not None:
            exit_hook(launch_metadata)


def _flatten(types: Iterable[Any], args: Sequence[Any]) -> list[Any]:
    """The kernel's parameters: no constexprs, tuples opened, descriptors in their pieces."""
    flat: list[Any] = []
    for kind, arg in zip(types, args, strict=True):
        if kind == "constexpr":
            continue
        if isinstance(kind, tuple):
            flat += _flatten(kind, arg)
        elif kind.startswith("tensordesc"):
            from triton.backends.driver import decompose_descriptor

            flat += decompose_descriptor(arg)
        else:
            flat.append(arg)
    return flat


class _Utils:
    """The driver's functions on a device; there is nothing to load."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {
            "max_shared_mem": MAX_SHARED[self.arch],
            "max_num_regs": 65536,
            "multiprocessor_count": 108,
            "warpSize": 32,
            "sm_clock_rate": 1_410_000,
            "mem_clock_rate": 1_593_000,
            "mem_bus_width": 5120,
        }

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads at most

    def unload_module(self, _module: int) -> None:
        pass


def _make_driver(arch: int, execute: Execute) -> Any:
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Driver(DriverBase):
        launcher_cls = _Launcher

        def __init__(self) -> None:
            self.utils = _Utils(arch)
            self.execute = execute

        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self) -> int:
            return 1000 + arch  # Triton keeps compiled kernels by device: one for each target

        def set_current_device(self, _device: int) -> None:
            pass

        def get_current_stream(self, _device: int | None = None) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_device_interface(self) -> Any:
            return torch.cpu

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_benchmarker(self) -> Callable[..., list[float]]:
            return lambda _call, quantiles=None, **_: [0.0] * len(quantiles or (0,))

        def get_empty_cache_for_benchmark(self) -> None:
            return None

    return Driver()
