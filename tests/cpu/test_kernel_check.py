"""Every kernel of every instruction set that runs, driven from C++ (kernel_check.cpp), no Python,
no torch: under AddressSanitizer and UBSan on this machine, and for aarch64 under qemu.
"""

import hashlib
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import aarch64
import pytest
from one_at_a_time import alone

from fusetune import _native

ROOT = Path(__file__).parents[2]
SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# What AddressSanitizer finds as well; without it files compile in three quarters of the time.
SANITIZE += ["-fno-sanitize=null,object-size"]
# GCC's: checks are calls, which compile in two thirds of the time.
CALLS = ["--param", "asan-instrumentation-with-call-threshold=0"]


DRIVER = Path(__file__).with_name("kernel_check.cpp")


def sanitized_isas() -> list[str]:
    """Those of this machine. "avx512" and "avx512_bf16" differ in four primitives of isa/avx512.h,
    and compiling either takes minutes: the former is left to machines where it is the best one."""
    found = _native.C.available_isas() if _native.C else []
    return [isa for isa in found if isa != "avx512" or "avx512_bf16" not in found]


def rules_for(machine: str, isas: Sequence[str] | None = None) -> dict[str, Any]:
    """setup.py's names, "ISAS" only those asked for, and "jobs": what it compiles for them, without
    the bindings."""
    with (
        mock.patch("setuptools.setup"),
        mock.patch.dict(os.environ, {"FUSETUNE_TARGET_MACHINE": machine}),
    ):
        rules = runpy.run_path(str(ROOT / "setup.py"))
    chosen = {isa: flags for isa, flags in rules["ISAS"].items() if isas is None or isa in isas}
    jobs = rules["compile_jobs"](chosen)
    jobs = [job for job in jobs if not job[0].name.startswith("bindings")]
    return {**rules, "ISAS": chosen, "jobs": jobs}


def build(machine: str, compiler: str, flags: list[str], isas: Sequence[str]) -> Path:
    """The driver, compiled as setup.py compiles the extension; kept until a source changes."""
    rules = rules_for(machine, isas)
    sources = [*sorted((ROOT / "csrc").rglob("*")), *sorted(Path(__file__).parent.glob("kernel_*"))]
    content = hashlib.sha256(repr((compiler, flags, rules["CXXFLAGS"], rules["ISAS"])).encode())
    for path in sources:
        if path.is_file():
            content.update(path.read_bytes())
    folder = ROOT / "build" / "kernel_check" / f"{machine}-{content.hexdigest()[:16]}"
    with alone(folder):
        driver = folder / "kernel_check"
        return driver if driver.exists() else compiled(rules, compiler, flags, driver)


def compiled(rules: dict[str, Any], compiler: str, flags: list[str], driver: Path) -> Path:
    folder = driver.parent
    # The driver itself without `flags`: its sums in double precision take most of the time, and the
    # sanitizers' allocator guards its arrays all the same.
    jobs = [(DRIVER, "common", []), *((*job[:2], [*flags, *job[2]]) for job in rules["jobs"])]

    def compile_one(job: tuple[Path, str, list[str]]) -> str:
        source, isa, job_flags = job
        target = str(folder / f"{isa}-{source.stem}.o")
        all_flags = [*rules["CXXFLAGS"], *job_flags]
        run([compiler, *all_flags, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, jobs))
    # Named at the end: an interrupted build leaves no driver behind.
    unfinished = folder / "unfinished"
    run([compiler, *flags, *objects, "-o", str(unfinished), "-lpthread"])
    unfinished.rename(driver)
    return driver


def kept_objects(machine: str, folder: Path, environment: dict[str, str]) -> list[tuple[str, Path]]:
    """(instruction set, object) of all that the extension is linked from: setup.py keeps them."""
    build = ROOT / "build"
    with alone(build):
        run([sys.executable, "setup.py", "-q", "build_ext", f"-b{folder}"], environment)
    return [
        (isa, build / f"temp.{machine}" / isa / source.relative_to(ROOT).with_suffix(".o"))
        for source, isa, _ in rules_for(machine)["jobs"]
    ]


def run(command: list[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    """The driver for this machine, with sanitizers: for the instruction sets that it has."""
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        pytest.skip(f"no C++ compiler: {compiler}")
    folder = tmp_path_factory.mktemp("sanitizers")
    (folder / "empty.cpp").write_text("int main() {}")
    for flags in ([*SANITIZE, *CALLS], SANITIZE):
        command = [compiler, *flags, str(folder / "empty.cpp"), "-o", str(folder / "empty")]
        if not subprocess.run(command, capture_output=True).returncode:
            return build(os.uname().machine, compiler, flags, sanitized_isas())
    pytest.skip(f"{compiler} has no sanitizer libraries")


@pytest.mark.slow
@pytest.mark.timeout(1500)  # the first compiles every kernel for every instruction set
@pytest.mark.parametrize("isa", sanitized_isas())
def test_with_sanitizers(sanitized, isa):
    lines = run([str(sanitized), isa]).splitlines()
    assert {line.split()[0] for line in lines} == {isa}


@pytest.mark.slow
def test_neon_under_qemu(tmp_path):
    """With the objects of the wheel for aarch64 (tests/test_packaging.py): setup.py keeps them."""
    environment = aarch64.environment()
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if not qemu:
        pytest.skip("qemu-aarch64 is not installed")
    rules = rules_for("aarch64")
    objects = [str(path) for _, path in kept_objects("aarch64", tmp_path, environment)]
    driver = str(tmp_path / "kernel_check")
    flags = [*rules["CXXFLAGS"], "-static", f"-I{ROOT / 'csrc'}"]
    run([aarch64.COMPILERS["CXX"], *flags, str(DRIVER), *objects, "-o", driver, "-lpthread"])
    lines = run([qemu, driver]).splitlines()
    assert {line.split()[0] for line in lines} == {"neon", "scalar"}


def test_no_code_is_shared_between_instruction_sets(sanitized, tmp_path):
    """What the objects of two instruction sets offer may be linked from the wrong one: those of the
    extension, and those of the driver, where less is inlined."""
    nm = shutil.which("nm")
    if not nm:
        pytest.skip("nm is not installed")
    machine = os.uname().machine
    environment = {**os.environ, "FUSETUNE_CUDA": "0", "FUSETUNE_TARGET_MACHINE": machine}
    objects = kept_objects(machine, tmp_path, environment)
    objects += [(path.name.split("-")[0], path) for path in sanitized.parent.glob("*-*.o")]
    assert {isa for isa, _ in objects} == {"common", *rules_for(machine)["ISAS"]}
    for isa, path in objects:
        if isa == "common":
            continue
        for line in run([nm, "-C", "--defined-only", "--extern-only", str(path)]).splitlines():
            _, kind, name = line.split(maxsplit=2)
            assert kind not in "TW" or f"fusetune::{isa}::" in name, f"{path} offers {name}"
