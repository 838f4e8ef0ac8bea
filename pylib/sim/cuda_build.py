"""Builds the CUDA launchers for the simulator: real host code, PTX inside, no CUDA runtime.

`nvcc` compiles csrc/cuda/*.cu to PTX of one architecture and to the host code that launches it; in
libcudart's place the module links `cudart.cpp`, which hands launches to the PTX interpreter. It is
built once per state of the sources, in the user's cache directory (FUSETUNE_CACHE_DIR).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CUDART = Path(__file__).with_name("cudart.cpp")


class CannotBuild(RuntimeError):
    """The launchers cannot be compiled on this machine; says why."""


def find_nvcc() -> str:
    """Path of nvcc: of CUDA_HOME, else of PATH, else the usual place."""
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else []
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    for path in candidates:
        if path and os.access(path, os.X_OK):
            return path
    raise CannotBuild("nvcc was not found: install the CUDA toolkit or set CUDA_HOME")


def launchers(arch: int) -> Path:
    """The module `_cuda` of this checkout, for the simulator, with PTX for sm_`arch`."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    bindings = ROOT / "csrc" / "bindings_cuda.cpp"
    if not sources or not bindings.exists():
        raise CannotBuild(f"the sources of the CUDA launchers are not at {ROOT / 'csrc'}")
    try:
        import pybind11
    except ImportError as error:
        raise CannotBuild("pybind11 is not installed") from error
    includes = [ROOT / "csrc", ROOT / "kernels" / "cuda", Path(pybind11.get_include())]
    headers = [p for d in includes[:2] for e in ("*.h", "*.cuh") for p in d.glob(e)]
    python = Path(sysconfig.get_paths()["include"])
    return build("_cuda", [*sources, bindings], [*includes, python], headers, arch)


def build(
    name: str, sources: Sequence[Path], includes: Sequence[Path], headers: Sequence[Path], arch: int
) -> Path:
    """A shared library of `sources` (.cu by nvcc, others by the host compiler) and the runtime."""
    nvcc = find_nvcc()
    command = [nvcc, "-std=c++17", "-O3", "-lineinfo", "--no-compress", "-Xcompiler=-fPIC"]
    command += [f"-gencode=arch=compute_{arch},code=compute_{arch}"]
    command += [f"-I{path}" for path in includes]
    files = [*sources, CUDART]
    key = hashlib.sha256(repr((sys.version, command, _version(nvcc))).encode())
    for path in [*files, *sorted(headers)]:
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    directory = _cache() / f"cuda-sim-{key.hexdigest()[:20]}"
    library = directory / f"{name}.so"
    if library.exists():
        return library
    directory.mkdir(parents=True, exist_ok=True)
    with _alone(directory), tempfile.TemporaryDirectory(dir=directory) as scratch:
        if library.exists():  # built by another process meanwhile
            return library

        def compile_one(source: Path) -> str:
            obj = f"{scratch}/{source.name}.o"
            visibility = ["-Xcompiler=-fvisibility=hidden"] if source.suffix == ".cpp" else []
            _call([*command, *visibility, "-c", str(source), "-o", obj])
            return obj

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile_one, files))
        linked = f"{scratch}/{name}.so"
        _call([nvcc, "-shared", "-cudart=none", *objects, "-o", linked])
        os.replace(linked, library)  # at once: what exists is whole
    return library


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Waits until no other process builds there."""
    import fcntl

    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CannotBuild(f"{' '.join(command)} failed:\n{done.stderr or done.stdout}")
    return done.stdout


@cache
def _version(nvcc: str) -> str:
    return _call([nvcc, "--version"])


def _cache() -> Path:
    chosen = os.environ.get("FUSETUNE_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fusetune"
