"""Lays the package out in build/gpu/site and compiles its native modules for this machine's card.

    python -m benchmarks.gpu.build        prints what was built and what was not, and why

Needs nothing that torch does not bring, apart from setuptools and a compiler: where pybind11 is not
installed torch's copy of its headers is taken. Without a compiler or nvcc the package is pure
Python, and its Triton kernels run all the same. Exit code 0 even then: what is missing shows in
`fusetune env`; what could be built and was not is code 1.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"
PYBIND11 = """def get_include(user=False):
    return {include!r}
"""


def main() -> int:
    lay_out()
    if importlib.util.find_spec("setuptools") is None:
        print("setuptools is not installed: no native modules")
        return 0
    return compile_modules()


def lay_out() -> None:
    """Copies of the Python files, beside the modules that an earlier call compiled."""
    for source, target in (("pylib", "fusetune"), ("kernels/triton", "fusetune/_triton")):
        skip = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / source, SITE / target, ignore=skip, dirs_exist_ok=True)


def compile_modules() -> int:
    nvcc = nvcc_path()
    environment = dict(os.environ)
    if importlib.util.find_spec("pybind11") is None:
        environment["PYTHONPATH"] = os.pathsep.join([str(borrowed_pybind11()), *path()])
    if nvcc is None:
        environment["FUSETUNE_CUDA"] = "0"
        print("no nvcc: no CUDA kernels")
    elif torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        environment["FUSETUNE_CUDA_ARCHS"] = f"{major}{minor}"
    code = build_ext(environment)
    if code and nvcc is not None:
        print("once more without the CUDA kernels")
        build_ext({**environment, "FUSETUNE_CUDA": "0"})
    return code


def build_ext(environment: dict[str, str]) -> int:
    """setup.py from outside the project, so that an old setuptools need not read pyproject.toml."""
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "setup.cfg").write_text("[metadata]\nname = fusetune\nversion = 0\n")
    command = [sys.executable, str(ROOT / "setup.py"), "-q", "build_ext"]
    command += ["--build-lib", str(SITE), "--build-temp", str(BUILD / "objects")]
    return subprocess.run(command, cwd=BUILD, env=environment).returncode


def nvcc_path() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(f"{home}/bin/nvcc") or shutil.which("nvcc")


def borrowed_pybind11() -> Path:
    """A folder with a module pybind11 that says where torch keeps the headers."""
    folder = BUILD / "pybind11"
    folder.mkdir(parents=True, exist_ok=True)
    include = str(Path(torch.__file__).parent / "include")
    (folder / "pybind11.py").write_text(PYBIND11.format(include=include))
    return folder


def path() -> list[str]:
    return [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []


if __name__ == "__main__":
    sys.exit(main())
