"""Builds fusetune._C: host C++ compiled once per instruction set, chosen at run time.

Python packages are mapped from their folders: pylib -> fusetune, kernels/triton ->
fusetune._triton. (`kernels/` itself is not a package: it would shadow Hugging Face's `kernels`.)

Environment: CXX the compiler; MAX_JOBS compilers at once (default: all cores); FUSETUNE_CXXFLAGS
and FUSETUNE_LDFLAGS more flags; FUSETUNE_TARGET_MACHINE (x86_64, aarch64) for a cross compiler.
"""

import os
import platform
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# Compiler flags of each instruction set; a kernel file in csrc/cpu is compiled once for each.
X86_ISAS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
ARM_ISAS = {"scalar": [], "neon": []}
MACHINE = os.environ.get("FUSETUNE_TARGET_MACHINE", platform.machine())
ISAS = {"x86_64": X86_ISAS, "AMD64": X86_ISAS, "aarch64": ARM_ISAS, "arm64": ARM_ISAS}.get(
    MACHINE, {"scalar": []}
)
# Files of csrc/cpu that do not depend on the instruction set.
ONCE = {"dispatch.cpp"}
# -ffp-contract=off: results that must equal another implementation's bit for bit may not depend on
# where the compiler saw a chance for an FMA; kernels ask for one where they want it.
# -g0: CPython's own flags ask for debug information, ten times the size of the code.
CXXFLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden"]
CXXFLAGS += ["-Wall", "-Wextra"]


def compile_jobs():
    """(source, directory for the object, flags) of every object file."""
    has = [f"-DFUSETUNE_HAS_{isa.upper()}" for isa in ISAS]
    jobs = []
    for source in [*sorted(CSRC.glob("*.cpp")), *sorted((CSRC / "cpu").glob("*.cpp"))]:
        if source.parent == CSRC or source.name in ONCE:
            jobs.append((source, "common", has))
            continue
        for isa, flags in ISAS.items():
            define = [f"-DFUSETUNE_ISA={isa}", f"-DFUSETUNE_ISA_{isa.upper()}=1"]
            jobs.append((source, isa, [*define, *flags]))
    return jobs


def is_current(obj, command):
    """Whether an object is newer than all it was made from, and was made by this command."""
    deps = obj.with_suffix(".d")
    stamp = obj.with_suffix(".command")
    if not (obj.exists() and deps.exists() and stamp.exists()) or stamp.read_text() != command:
        return False
    made_from = deps.read_text().replace("\\\n", " ").split(":", 1)[1]
    try:
        newest = max(os.stat(ROOT / path).st_mtime_ns for path in shlex.split(made_from))
    except FileNotFoundError:
        return False
    return newest <= obj.stat().st_mtime_ns


class BuildExt(build_ext):
    """Compiles csrc per instruction set, in parallel, only what changed, and links one module."""

    def finalize_options(self):
        # pip builds editable installs in a new directory each time, which would lose the objects.
        self.build_temp = self.build_temp or str(ROOT / "build" / f"temp.{MACHINE}")
        super().finalize_options()

    def build_extension(self, ext):
        import pybind11

        # Paths relative to the project keep the objects independent of where it lies.
        os.chdir(ROOT)
        flags = [*CXXFLAGS, *os.environ.get("FUSETUNE_CXXFLAGS", "").split()]
        includes = [*self.compiler.include_dirs, "csrc", pybind11.get_include()]

        def compile_one(job):
            source, directory, own_flags = job
            source = str(source.relative_to(ROOT))
            output_dir = str(Path(self.build_temp) / directory)
            (name,) = self.compiler.object_filenames([source], output_dir=output_dir)
            obj = Path(name)
            all_flags = [*flags, *own_flags]
            command = " ".join([*self.compiler.compiler_so, *includes, *all_flags])
            if not self.force and is_current(obj, command):
                return name
            self.compiler.compile(
                [source],
                output_dir=output_dir,
                include_dirs=includes,
                extra_postargs=[*all_flags, "-MMD", "-MF", str(obj.with_suffix(".d"))],
            )
            obj.with_suffix(".command").write_text(command)
            return name

        workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(workers) as pool:
            objects = list(pool.map(compile_one, compile_jobs()))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=["-ldl", *os.environ.get("FUSETUNE_LDFLAGS", "").split()],
            target_lang="c++",
        )


setup(
    package_dir={"fusetune": "pylib", "fusetune._triton": "kernels/triton"},
    packages=[
        "fusetune",
        *(f"fusetune.{p}" for p in find_packages(str(ROOT / "pylib"))),
        "fusetune._triton",
    ],
    package_data={"fusetune": ["py.typed"], "fusetune.sim": ["cudart.cpp"]},
    ext_modules=[Extension("fusetune._C", ["csrc/bindings.cpp"], language="c++")],
    cmdclass={"build_ext": BuildExt},
)
