"""What compiled kernels need: registers, stack, spills, shared memory, instructions. No GPU.

    with compile.triton_kernels(90) as kernels:
        fusetune._triton.lora_shrink.launch(...)      # compiled and recorded, not executed
    kernels[0].usage.registers

The tools that read cubins, cuobjdump and nvdisasm, are those of the triton wheel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from fusetune.sim.cuda_build import find_nvcc
from fusetune.sim.run import Dim3
from fusetune.sim.triton_driver import MAX_SHARED, Compiled, driver_in_place

ARCHS = tuple(MAX_SHARED)


@dataclass(frozen=True)
class Usage:
    """Resources of a kernel, and its instructions (as they stand in the code, not as executed)."""

    registers: int
    stack: int  # bytes of each thread
    static_shared: int  # bytes of each CTA
    dynamic_shared: int = 0
    opcodes: Counter[str] = field(default_factory=Counter)  # with modifiers: "LDG.E.128"

    @property
    def shared(self) -> int:
        return self.static_shared + self.dynamic_shared

    def count(self, pattern: str) -> int:
        """How many instructions match a regular expression from their start."""
        return sum(n for opcode, n in self.opcodes.items() if re.match(pattern, opcode))

    @property
    def spills(self) -> int:
        """Loads and stores of local memory: of spilled registers, or of arrays."""
        return self.count(r"(LDL|STL)\b")


@dataclass(frozen=True)
class Kernel:
    """A kernel that host code has compiled and would have launched."""

    name: str
    grid: Dim3
    block: Dim3
    usage: Usage


@contextmanager
def triton_kernels(arch: int) -> Iterator[list[Kernel]]:
    """Collects the kernels that host code launches; they are compiled for sm_`arch`, not executed.

    The tensors are on the CPU, and results stay as they are. To reach kernels through the ops, use
    `fusetune.sim.run.accept_cpu_tensors("triton")` as well.
    """
    kernels: list[Kernel] = []

    def execute(kernel: Compiled, grid: Dim3, _args: list[Any]) -> None:
        usage = _usage_of_file(kernel.files["cubin"])[kernel.name]
        usage = replace(usage, dynamic_shared=kernel.shared)
        kernels.append(Kernel(kernel.name, grid, (32 * kernel.warps, 1, 1), usage))

    with driver_in_place(arch, execute):
        yield kernels


def cuda_kernels(source: Path, arch: int, includes: Sequence[Path] = ()) -> dict[str, Usage]:
    """The kernels of a .cu file by mangled name, compiled by nvcc for sm_`arch`."""
    with tempfile.TemporaryDirectory() as scratch:
        cubin = Path(scratch) / "kernels.cubin"
        command = [find_nvcc(), "-cubin", f"-arch=sm_{arch}", "-std=c++17", "-O3", "-o", str(cubin)]
        _run([*command, *(f"-I{path}" for path in includes), str(source)])
        return usage_of(cubin.read_bytes())


def usage_of(cubin: bytes) -> dict[str, Usage]:
    """The kernels in a cubin, by name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _read(file.name)


@cache
def _usage_of_file(path: str) -> dict[str, Usage]:
    return _read(path)


_RESOURCES = re.compile(
    r"Function (?P<name>[\w$]+):\s+"
    r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+)"
)
_SECTION = re.compile(r"^\.text\.([\w$]+):", re.M)
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)", re.M)


def _read(path: str) -> dict[str, Usage]:
    resources = _run([_tool("cuobjdump"), "--dump-resource-usage", path])
    sections = _SECTION.split(_run([_tool("nvdisasm"), "-c", path]))
    opcodes = {
        name: Counter(_OPCODE.findall(code))
        for name, code in zip(sections[1::2], sections[2::2], strict=True)
    }
    return {
        m["name"]: Usage(
            int(m["registers"]), int(m["stack"]), int(m["shared"]), opcodes=opcodes[m["name"]]
        )
        for m in _RESOURCES.finditer(resources)
    }


def _tool(name: str) -> str:
    """A tool of the triton wheel."""
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).parent / "bin" / name)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr or done.stdout}")
    return done.stdout
