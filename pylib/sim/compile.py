"""What compiled kernels need: registers, stack, spills, shared memory, instructions. No GPU.

    with compile.triton_kernels(90) as kernels:
        fusetune._triton.lora_shrink.launch(...)      # compiled and recorded, not executed
    kernels[0].usage.registers

The tools that read cubins, cuobjdump and nvdisasm, are those of the triton wheel. nvdisasm takes a
third of a second to start: it is given the code of all kernels of an architecture at once.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
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


@dataclass
class Kernel:
    """A kernel that host code has compiled and would have launched."""

    name: str
    grid: Dim3
    block: Dim3
    usage: Usage = field(init=False)  # known when the block of `triton_kernels` has ended


@contextmanager
def triton_kernels(arch: int) -> Iterator[list[Kernel]]:
    """Collects the kernels that host code launches; they are compiled for sm_`arch`, not executed.

    The tensors are on the CPU, and results stay as they are. To reach kernels through the ops, use
    `fusetune.sim.run.accept_cpu_tensors("triton")` as well.
    """
    kernels: list[Kernel] = []
    compiled: list[Compiled] = []

    def execute(kernel: Compiled, grid: Dim3, _args: list[Any]) -> None:
        compiled.append(kernel)
        kernels.append(Kernel(kernel.name, grid, (32 * kernel.warps, 1, 1)))

    with driver_in_place(arch, execute):
        yield kernels
    found = usage_of([Path(one.files["cubin"]) for one in compiled], arch)
    for kernel, one in zip(kernels, compiled, strict=True):
        usage = found[Path(one.files["cubin"])][one.name]
        kernel.usage = replace(usage, dynamic_shared=one.shared)


def cuda_kernels(source: Path, arch: int, includes: Sequence[Path] = ()) -> dict[str, Usage]:
    """The kernels of a .cu file by mangled name, compiled by nvcc for sm_`arch`."""
    with tempfile.TemporaryDirectory() as scratch:
        cubin = Path(scratch) / "kernels.cubin"
        command = [find_nvcc(), "-cubin", f"-arch=sm_{arch}", "-std=c++17", "-O3", "-o", str(cubin)]
        _run([*command, *(f"-I{path}" for path in includes), str(source)])
        return usage_of([cubin], arch)[cubin]


def built_kernels(module: Path) -> dict[tuple[int, str], Usage]:
    """The kernels of a shared library by (architecture, mangled name)."""
    with tempfile.TemporaryDirectory() as folder:
        _run([_tool("cuobjdump"), "--extract-elf", "all", str(module)], folder)
        cubins: dict[int, list[Path]] = {}
        for path in Path(folder).glob("*.cubin"):
            matched = re.search(r"\.sm_(\d+)\.cubin", path.name)
            assert matched is not None
            cubins.setdefault(int(matched[1]), []).append(path)
        return {
            (arch, name): usage
            for arch, paths in cubins.items()
            for of_file in usage_of(paths, arch).values()
            for name, usage in of_file.items()
        }


def usage_of(cubins: Iterable[Path], arch: int) -> dict[Path, dict[str, Usage]]:
    """The kernels in cubins for sm_`arch`, by name."""
    paths = set(cubins)
    code = {(path, name): part for path in paths for name, part in _sections(path, ".text.")}
    opcodes = dict(zip(code, _opcodes([*code.values()], arch), strict=True))
    return {path: _resources(path, opcodes) for path in paths}


_RESOURCES = re.compile(
    r"Function (?P<name>[\w$]+):\s+"
    r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+)"
)
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)", re.M)
_INSTRUCTION = 16  # bytes


def _resources(path: Path, opcodes: dict[tuple[Path, str], Counter[str]]) -> dict[str, Usage]:
    said = _run([_tool("cuobjdump"), "--dump-resource-usage", str(path)])
    return {
        m["name"]: Usage(
            int(m["registers"]), int(m["stack"]), int(m["shared"]), opcodes=opcodes[path, m["name"]]
        )
        for m in _RESOURCES.finditer(said)
    }


def _opcodes(codes: Sequence[bytes], arch: int) -> list[Counter[str]]:
    """The instructions of each piece of machine code."""
    if not codes:
        return []
    # sm_90a and later ones with the letter have instructions beyond those of their number.
    machine = f"SM{arch}a" if arch >= 90 else f"SM{arch}"
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        listed = _run([_tool("nvdisasm"), "--binary", machine, file.name])
    names = _OPCODE.findall(listed)
    if _INSTRUCTION * len(names) != sum(map(len, codes)):
        raise RuntimeError(f"nvdisasm listed {len(names)} instructions of sm_{arch}: not all")
    rest = iter(names)
    return [Counter(islice(rest, len(code) // _INSTRUCTION)) for code in codes]


def _sections(path: Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    """Sections of a 64-bit ELF file, as (what follows the prefix in their names, content)."""
    elf = path.read_bytes()
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    # name, type, flags, address, offset, size, ...
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    for header in headers:
        start = headers[names][4] + header[0]
        name = elf[start : elf.index(b"\0", start)].decode()
        if name.startswith(prefix):
            yield name.removeprefix(prefix), elf[header[4] :][: header[5]]


def _tool(name: str) -> str:
    """A tool of the triton wheel."""
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).parent / "bin" / name)


def _run(command: list[str], folder: str | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr or done.stdout}")
    return done.stdout
