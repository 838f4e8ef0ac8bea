"""Loads the native module and gives it torch's thread pool.

``C`` is the module ``fusetune._C``, or None where it cannot be used; ``reason`` then says why.
A package without the extension works: every op has a reference implementation.
"""

import ctypes
import importlib
import os
import sys
from types import ModuleType

import torch

__all__ = ["C", "reason"]

AT_GET_NUM_THREADS = "_ZN2at15get_num_threadsEv"  # at::get_num_threads()
GOMP_PARALLEL = "GOMP_parallel"  # a parallel region of the OpenMP that libtorch is linked to


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("fusetune._C")
    except ImportError as error:
        return None, f"the native module fusetune._C could not be imported: {error}"
    try:
        module.isa()
    except ValueError as error:  # FUSETUNE_CPU_ISA names what this machine does not have
        return None, str(error)
    _share_thread_pool(module)
    return module, None


def _share_thread_pool(module: ModuleType) -> None:
    """Hands torch's pool to the native module, so that the process has one pool.

    Without it (a torch built without either function) the kernels run on one thread.
    """
    library = libtorch_cpu()
    if library is None:
        return
    parallel_for = address(library, "torch_parallel_for")  # stable C API, torch >= 2.10
    get_num_threads = address(library, "torch_get_num_threads")
    if parallel_for and get_num_threads:
        module.set_torch_pool(parallel_for, get_num_threads)
        return
    gomp_parallel = address(library, GOMP_PARALLEL)
    at_get_num_threads = address(library, AT_GET_NUM_THREADS)
    if gomp_parallel and at_get_num_threads:
        module.set_gomp_pool(gomp_parallel, at_get_num_threads)


def libtorch_cpu() -> ctypes.CDLL | None:
    """The library of torch's CPU backend, which `import torch` has loaded; None if not found."""
    name = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
    for path in (name, os.path.join(os.path.dirname(torch.__file__), "lib", name)):
        try:
            return ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        except (AttributeError, OSError):  # not this name, or a platform without RTLD_NOLOAD
            continue
    return None


def address(library: ctypes.CDLL, symbol: str) -> int:
    """Address of a function of the library, or of those it is linked to; 0 where none has it."""
    try:
        return ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value or 0
    except AttributeError:
        return 0


C, reason = _load()
