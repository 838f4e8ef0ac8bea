"""Builds fusetune._C, host C++ compiled once per instruction set and chosen at run time, and, where
there is nvcc, fusetune._cuda, CUDA C++ compiled for every GPU architecture.

Python packages are mapped from their folders: pylib -> fusetune, kernels/triton ->
fusetune._triton. (`kernels/` itself is not a package: it would shadow Hugging Face's `kernels`.)

Environment: CXX the compiler; MAX_JOBS compilers at once (default: all cores); FUSETUNE_CXXFLAGS
and FUSETUNE_LDFLAGS more flags; FUSETUNE_TARGET_MACHINE (x86_64, aarch64) for a cross compiler;
CUDA_HOME where nvcc is; FUSETUNE_CUDA 0: no CUDA kernels, 1: an error where they cannot be built;
FUSETUNE_CUDA_ARCHS the architectures (default: "75;80;86;89;90;100;120", as far as nvcc has them).
"""

import os
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# Compiler flags of each instruction set; a kernel file in csrc/cpu is compiled once for each.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512_BF16 = [
    *AVX512,
    *("-mavx512bf16", "-mavx512vnni", "-mavx512vbmi"),
    "-DFUSETUNE_ISA_AVX512=1",
]
X86_ISAS = {
    "scalar": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": AVX512_BF16,
    "amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-DFUSETUNE_ISA_AVX512_BF16=1"],
}
ARM_ISAS = {"scalar": [], "neon": []}
MACHINE = os.environ.get("FUSETUNE_TARGET_MACHINE", platform.machine())
ISAS = {"x86_64": X86_ISAS, "AMD64": X86_ISAS, "aarch64": ARM_ISAS, "arm64": ARM_ISAS}.get(
    MACHINE, {"scalar": []}
)
# Files of csrc/cpu that do not depend on the instruction set.
ONCE = {"dispatch.cpp"}
# Instruction sets with few kernels of their own, which have the rest from the one before them.
ONLY = {"amx": {"linear.cpp", "linear_dx.cpp"}}
# -ffp-contract=off: results that must equal another implementation's bit for bit may not depend on
# where the compiler saw a chance for an FMA; kernels ask for one where they want it.
# -g0: CPython's own flags ask for debug information, ten times the size of the code.
CXXFLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden"]
CXXFLAGS += ["-Wall", "-Wextra"]

CUDA_ARCHS = "75;80;86;89;90;100;120"
NVCCFLAGS = [
    "-std=c++17",
    "-O3",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Icsrc",
    "-Ikernels/cuda",
]
NVCCFLAGS += ["-Xfatbin=-compress-all", "-t", "2"]  # -t: architectures at once


def find_nvcc():
    """Path of nvcc, or None where CUDA kernels are not to be built."""
    wanted = os.environ.get("FUSETUNE_CUDA", "")
    if wanted == "0" or platform.machine() != MACHINE:
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for path in (f"{home}/bin/nvcc", shutil.which("nvcc")):
        if path and os.access(path, os.X_OK):
            return path
    if wanted == "1":
        raise SystemExit("FUSETUNE_CUDA=1, but there is no nvcc: set CUDA_HOME")
    return None


def cuda_targets(nvcc):
    """nvcc's flags for machine code of all architectures, and PTX of the newest for later ones."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = {name.removeprefix("compute_") for name in listed.stdout.split()}
    wanted = os.environ.get("FUSETUNE_CUDA_ARCHS")
    archs = (wanted or CUDA_ARCHS).replace(",", ";").split(";")
    if not wanted:
        archs = [arch for arch in archs if arch in known]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def compile_jobs(isas=ISAS):
    """(source, directory for the object, flags) of every object file for these instruction sets."""
    has = [f"-DFUSETUNE_HAS_{isa.upper()}" for isa in isas]
    jobs = []
    for source in [*sorted(CSRC.glob("*.cpp")), *sorted((CSRC / "cpu").glob("*.cpp"))]:
        if source.name == "bindings_cuda.cpp":
            continue
        if source.parent == CSRC or source.name in ONCE:
            jobs.append((source, "common", has))
            continue
        for isa, flags in isas.items():
            if source.name not in ONLY.get(isa, {source.name}):
                continue
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


WORKERS = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


class BuildExt(build_ext):
    """Compiles csrc, in parallel, only what changed, and links the modules."""

    def finalize_options(self):
        # pip builds editable installs in a new directory each time, which would lose the objects.
        self.build_temp = self.build_temp or str(ROOT / "build" / f"temp.{MACHINE}")
        super().finalize_options()

    def build_extension(self, ext):
        # Paths relative to the project keep the objects independent of where it lies.
        os.chdir(ROOT)
        if ext.name == "fusetune._cuda":
            self.build_cuda(ext)
        else:
            self.build_host(ext)

    def compile_host(self, job):
        """Name of the object made from a host C++ source."""
        import pybind11

        source, directory, own_flags = job
        source = str(source.relative_to(ROOT))
        includes = [*self.compiler.include_dirs, "csrc", pybind11.get_include()]
        output_dir = str(Path(self.build_temp) / directory)
        (name,) = self.compiler.object_filenames([source], output_dir=output_dir)
        obj = Path(name)
        flags = [*CXXFLAGS, *os.environ.get("FUSETUNE_CXXFLAGS", "").split(), *own_flags]
        command = " ".join([*self.compiler.compiler_so, *includes, *flags])
        if not self.force and is_current(obj, command):
            return name
        self.compiler.compile(
            [source],
            output_dir=output_dir,
            include_dirs=includes,
            extra_postargs=[*flags, "-MMD", "-MF", str(obj.with_suffix(".d"))],
        )
        obj.with_suffix(".command").write_text(command)
        return name

    def compile_cuda(self, nvcc, targets, source):
        """Name of the object made from a .cu file."""
        obj = Path(self.build_temp) / "cuda" / f"{source.stem}.o"
        command = [nvcc, *NVCCFLAGS, *targets, "-c", str(source.relative_to(ROOT)), "-o", str(obj)]
        if self.force or not is_current(obj, " ".join(command)):
            obj.parent.mkdir(parents=True, exist_ok=True)
            self.spawn([*command, "-MMD", "-MF", str(obj.with_suffix(".d"))])
            obj.with_suffix(".command").write_text(" ".join(command))
        return str(obj)

    def build_cuda(self, ext):
        nvcc = find_nvcc()
        targets = cuda_targets(nvcc)
        with ThreadPoolExecutor(WORKERS) as pool:
            sources = sorted((CSRC / "cuda").glob("*.cu"))
            objects = list(
                pool.map(lambda source: self.compile_cuda(nvcc, targets, source), sources)
            )
        objects.append(self.compile_host((CSRC / "bindings_cuda.cpp", "cuda", [])))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # CUDA's runtime goes in whole and stays hidden: torch brings its own.
        flags = ["-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL"]
        self.spawn([nvcc, *flags, *objects, "-o", str(target)])

    def build_host(self, ext):
        with ThreadPoolExecutor(WORKERS) as pool:
            objects = list(pool.map(self.compile_host, compile_jobs()))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=os.environ.get("FUSETUNE_LDFLAGS", "").split(),
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
    ext_modules=[
        Extension(
            "fusetune._C",
            [
                "csrc/bindings.cpp",
                *(f"csrc/bindings_{part}.cpp" for part in ("adapters", "prefix", "prompts")),
            ],
            language="c++",
        ),
        *([Extension("fusetune._cuda", ["csrc/bindings_cuda.cpp"])] if find_nvcc() else []),
    ],
    cmdclass={"build_ext": BuildExt},
)
