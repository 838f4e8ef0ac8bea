"""Builds fusetune._C: host C++ compiled once per instruction set, chosen at run time.

Python packages are mapped from their folders: pylib -> fusetune, kernels/triton -> fusetune._triton.
(`kernels/` itself is not a package: it would shadow Hugging Face's `kernels`.)
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent

# Compiler flags of each instruction set; a kernel file in csrc/cpu is compiled once for each.
X86_ISAS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
ARM_ISAS = {"scalar": [], "neon": []}
ISAS = {"x86_64": X86_ISAS, "AMD64": X86_ISAS, "aarch64": ARM_ISAS, "arm64": ARM_ISAS}.get(
    os.environ.get("FUSETUNE_TARGET_MACHINE", platform.machine()), {"scalar": []}
)
# Files of csrc/cpu that do not depend on the instruction set.
ONCE = {"dispatch.cpp"}


class BuildExt(build_ext):
    """Compiles csrc/cpu/*.cpp per instruction set, in parallel, and links one module."""

    def build_extension(self, ext):
        import pybind11

        includes = [str(ROOT / "csrc"), pybind11.get_include()]
        common = ["-std=c++17", "-O3", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
        common += os.environ.get("FUSETUNE_CXXFLAGS", "").split()
        has = "".join(f" -DFUSETUNE_HAS_{isa.upper()}" for isa in ISAS).split()
        jobs = [(path, [], "") for path in sorted((ROOT / "csrc").glob("*.cpp"))]
        for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            if path.name in ONCE:
                jobs.append((path, [], ""))
                continue
            jobs += [(path, flags, isa) for isa, flags in ISAS.items()]

        def compile_one(job):
            path, flags, isa = job
            macros = [("FUSETUNE_ISA", isa), (f"FUSETUNE_ISA_{isa.upper()}", "1")] if isa else []
            return self.compiler.compile(
                [str(path.relative_to(ROOT))],
                output_dir=str(Path(self.build_temp) / (isa or "common")),
                macros=macros,
                include_dirs=includes + self.compiler.include_dirs,
                extra_postargs=common + has + flags,
                depends=[str(h) for h in (ROOT / "csrc").rglob("*.h")],
            )

        os.chdir(ROOT)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            objects = [o for result in pool.map(compile_one, jobs) for o in result]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=["-ldl", *os.environ.get("FUSETUNE_LDFLAGS", "").split()],
            target_lang="c++",
        )


def extension():
    from setuptools import Extension

    return Extension("fusetune._C", ["csrc/bindings.cpp"], language="c++")


setup(
    package_dir={"fusetune": "pylib", "fusetune._triton": "kernels/triton"},
    packages=[
        "fusetune",
        *(f"fusetune.{p}" for p in find_packages(str(ROOT / "pylib"))),
        "fusetune._triton",
    ],
    package_data={"fusetune": ["py.typed"]},
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExt},
)
