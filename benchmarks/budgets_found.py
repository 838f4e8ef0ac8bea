"""What the GPU kernels need, compiled, and move, executed by the simulator: see budgets.py.

Found once for every state of the sources, and kept in build/budgets.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fusetune
from benchmarks.gpu_case import Case
from benchmarks.gpu_kernels import CUDA, TRITON
from fusetune.sim import compile as offline
from fusetune.sim import cuda_sim
from fusetune.sim.cuda_build import find_nvcc
from fusetune.sim.ptx.traffic import SECTOR
from fusetune.sim.run import Launch, accept_cpu_tensors
from fusetune.sim.triton_driver import MAX_SHARED, simulated_driver

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "budgets"

L2_MIB = (6, 40)  # of an RTX 3090 and of an A100
EXECUTED = (75, 80)  # matrix instructions that only later architectures have are not simulated

# Machine instructions by what they are for, and the first architecture that has them.
INSTRUCTIONS = {
    "tensor cores": (r"(HMMA|HGMMA|UT\w*MMA)\b", 75),
    "wide loads": (r"(LDG|LDGSTS)\b.*\.128", 75),
    "wide stores": (r"STG\b.*\.128", 75),
    "asynchronous copies": (r"(LDGSTS|UTMALDG)\b", 80),
}
# Of the large matmuls: the tensor cores that an architecture was made for.
NEWEST_TENSOR_CORES = {90: r"HGMMA\b", 100: r"UT\w*MMA\b"}

Found = dict[str, dict[str, Any]]  # {"sm_80, lora_da": {"registers": 80, ...}}


def compiled_triton() -> Found:
    """Every Triton case on every architecture where the ops offer it."""
    # Several cases a task: their machine code is read at once.
    names = [case.name for case in TRITON]
    tasks = [(names[i : i + 8], arch) for i in range(0, len(names), 8) for arch in MAX_SHARED]
    sources = ["kernels/triton", "pylib/sim/compile.py"]
    return _kept("compiled-triton", sources, lambda: _in_processes(_compile, tasks))


def compiled_cuda() -> Found:
    """Every kernel of the built module `_cuda`. Raises FileNotFoundError where it is not built."""
    module = next(Path(fusetune.__file__).parent.glob("_cuda.*.so"), None)
    if module is None:
        raise FileNotFoundError("the CUDA kernels are not built: that takes nvcc")
    sources = [str(module), "pylib/sim/compile.py"]
    return _kept("compiled-cuda", sources, lambda: _take_apart(module))


def executed_triton() -> Found:
    """Counts of every Triton case at its small shape."""
    tasks = [("triton", case.name, arch) for case in TRITON for arch in case.archs(EXECUTED)]
    sources = ["kernels/triton", "pylib/ops", "pylib/sim"]
    return _kept("executed-triton", sources, lambda: _in_processes(_execute, tasks))


def executed_cuda() -> Found:
    """Counts of every CUDA case at its small shape."""
    tasks = [("cuda", case.name, arch) for case in CUDA for arch in EXECUTED]
    sources = ["kernels/cuda", "csrc/cuda", "csrc/bindings_cuda.cpp", "pylib/ops", "pylib/sim"]

    def execute() -> Found:
        for arch in EXECUTED:  # built once, before several processes want it
            with cuda_sim(arch):
                pass
        return _in_processes(_execute, tasks)

    return _kept("executed-cuda", sources, execute)


PARTS: dict[str, Callable[[], Found]] = {
    "compiled-triton": compiled_triton,
    "compiled-cuda": compiled_cuda,
    "executed-triton": executed_triton,
    "executed-cuda": executed_cuda,
}


def toolchain() -> dict[str, str]:
    """Other compilers make other code: a record is of one version of each."""
    said = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True)
    release = re.search(r"release ([\d.]+)", said.stdout)
    assert release is not None
    return {"triton": importlib.metadata.version("triton"), "nvcc": release[1]}


def _compile(names: list[str], arch: int) -> Found:
    """Of these cases, those that the ops offer on sm_`arch`."""
    cases = [case for case in TRITON if case.name in names and case.archs([arch])]
    launched: dict[str, list[offline.Kernel]] = {}
    with offline.triton_kernels(arch) as kernels, accept_cpu_tensors("triton"):
        for case in cases:
            before = len(kernels)
            case.call(case.full, arch)
            launched[case.name] = [k for k in kernels[before:] if k.name == case.kernel]
    return {f"sm_{arch}, {case.name}": _needed(case, launched[case.name], arch) for case in cases}


def _needed(case: Case, launched: list[offline.Kernel], arch: int) -> dict[str, Any]:
    found = [kernel.usage for kernel in launched]
    usage = max(found, key=lambda one: (one.spills, one.stack, one.registers))  # of its launches
    # Triton multiplies by FMA on sm_75.
    needs = [what for what in case.needs if arch >= 80 or what != "tensor cores"]
    if case.newest and arch in NEWEST_TENSOR_CORES:
        has = usage.count(NEWEST_TENSOR_CORES[arch]) > 0
        return resources(usage, arch, needs, [] if has else ["newest"])
    return resources(usage, arch, needs)


def resources(
    usage: offline.Usage, arch: int, needs: Iterable[str], missing: Iterable[str] = ()
) -> dict[str, Any]:
    absent = [
        what
        for what in needs
        if arch >= INSTRUCTIONS[what][1] and not usage.count(INSTRUCTIONS[what][0])
    ]
    return {
        "registers": usage.registers,
        "shared": usage.shared,
        "stack": usage.stack,
        "spills": usage.spills,
        "missing": [*absent, *missing],
    }


# What a CUDA kernel is written for, by its name.
_CUDA_NEEDS = {
    "linear_4bit_stream": ("tensor cores", "wide loads"),
    "linear_4bit_tile": ("tensor cores", "wide loads", "asynchronous copies"),
    "linear_4bit_dx": ("tensor cores", "wide loads", "asynchronous copies"),
    "linear_4bit_fp32": ("wide loads",),
    "dequantize_4bit": ("wide stores",),
    "sum_splits": ("wide loads",),
}
# What follows a kernel's name where it is mangled: type, tiles of rows.
_ARGUMENTS = re.compile(r"I(?P<type>f|6__half|13__nv_bfloat16)(?:Li(?P<tiles>\d+)E)?E")
_TYPES = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}


def _take_apart(module: Path) -> Found:
    found: Found = {}
    for (arch, mangled), usage in offline.built_kernels(module).items():
        kernel, label, dtype = demangled(mangled)
        if dtype != "bf16" or arch >= 80:  # sm_75 has no bf16: its kernels are empty
            found[f"sm_{arch}, {label}"] = resources(usage, arch, _CUDA_NEEDS[kernel])
    return found


def demangled(name: str) -> tuple[str, str, str]:
    """(kernel, "kernel<bf16, 4>", "bf16")."""
    length = re.match(r"_ZN8fusetune(\d+)", name)
    kernel = name[length.end() :][: int(length[1])] if length else name
    if length is None or kernel not in _CUDA_NEEDS:
        raise ValueError(
            f"say what the kernel {name} is written for, in benchmarks/budgets_found.py"
        )
    found = _ARGUMENTS.match(name[length.end() + len(kernel) :])
    if found is None:
        return kernel, kernel, "fp32"
    dtype = _TYPES[found["type"]]
    return kernel, f"{kernel}<{', '.join(filter(None, (dtype, found['tiles'])))}>", dtype


def _execute(backend: str, name: str, arch: int) -> Found:
    if backend == "cuda":
        case = _case(CUDA, name)
        with cuda_sim(arch) as run:
            case.call(case.small, arch)
    else:
        case = _case(TRITON, name)
        traced = case.compulsory is not None
        with simulated_driver(arch, traced) as run, accept_cpu_tensors("triton"):
            case.call(case.small, arch)
    launch = next(launch for launch in run.launches if case.kernel in launch.kernel)
    counts = launch.counts
    numbers = {
        "load sectors": counts.global_load_sectors,
        "store sectors": counts.global_store_sectors,
        "shared wavefronts": counts.shared_wavefronts,
        "mma flops": counts.mma_flops,
    }
    return {f"sm_{arch}, {name}": numbers | multiples(case, launch)}


def multiples(case: Case, launch: Launch) -> dict[str, Any]:
    """What a launch moves, in multiples of what is compulsory; nothing where no case says that."""
    if case.compulsory is None or launch.trace is None:
        return {}
    least = case.compulsory(case.small) / SECTOR
    moved = {size: launch.trace.memory_sectors(size << 20) / least for size in L2_MIB}
    beyond = moved[max(L2_MIB)] > case.within
    return {
        "executed": round(launch.counts.global_sectors / least, 3),
        **{f"memory, L2 of {size} MiB": round(times, 3) for size, times in moved.items()},
        "beyond": f"memory moves more than {case.within} times the least" if beyond else "",
    }


def _case(cases: Iterable[Case], name: str) -> Case:
    return next(case for case in cases if case.name == name)


def _in_processes(function: Callable[..., Found], tasks: list[tuple[Any, ...]]) -> Found:
    found: Found = {}
    workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, get_context("spawn"), _one_thread) as pool:
        for result in pool.map(function, *zip(*tasks, strict=True), chunksize=2):
            found.update(result)
    return found


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _kept(part: str, sources: Iterable[str], find: Callable[[], Found]) -> Found:
    """What `find` finds, once for every state of the sources."""
    key = hashlib.sha256(repr((toolchain(), sys.version)).encode())
    own = ("budgets_found", *(f"gpu_{part}" for part in _CASES))
    for name in (*(f"benchmarks/{file}.py" for file in own), *sources):
        path = ROOT / name
        files = (
            sorted(p for p in path.rglob("*") if p.suffix in _SOURCES) if path.is_dir() else [path]
        )
        for file in (f for f in files if f.suffix in _SOURCES):
            key.update(file.name.encode() + b"\0" + file.read_bytes())
    kept = KEPT / f"{part}-{key.hexdigest()[:20]}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    found = find()
    kept.parent.mkdir(parents=True, exist_ok=True)
    for older in kept.parent.glob(f"{part}-*.json"):
        older.unlink()
    kept.write_text(json.dumps(found, indent=1))
    return found


_CASES = ("case", "kernels", "kernels_methods", "launches", "bottleneck", "prompts")
_SOURCES = (".py", ".cpp", ".cu", ".cuh", ".h", ".so")
