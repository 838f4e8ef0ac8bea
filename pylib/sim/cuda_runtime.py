"""Runs the compiled CUDA launchers on CPU tensors: their kernel launches go to the interpreter."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakValueDictionary

import torch

from fusetune.sim import cuda_build
from fusetune.sim.ptx import Program
from fusetune.sim.run import Launch, Run, accept_cpu_tensors

ARCHS = (75, 80, 86, 89, 120)
_LAUNCH_FAILED = 719  # cudaErrorLaunchFailure
_LaunchCallback = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,  # fat binary
    ctypes.c_char_p,  # kernel
    ctypes.POINTER(ctypes.c_uint),  # grid
    ctypes.POINTER(ctypes.c_uint),  # block
    ctypes.c_size_t,  # dynamic shared memory
    ctypes.POINTER(ctypes.c_void_p),  # addresses of the arguments
)


@contextmanager
def cuda_sim(arch: int = 80) -> Iterator[Run]:
    """Executes the CUDA C++ kernels, compiled to PTX of sm_`arch`; forces backend "cuda".

    Needs a source checkout, nvcc and a C++ compiler; raises `CannotBuild` where one is missing.
    """
    if arch not in ARCHS:
        raise ValueError(f"arch must be one of {ARCHS}, got {arch!r}")
    library = cuda_build.launchers(arch)
    with ExitStack() as stack:
        device = stack.enter_context(device_of(library, arch))
        stack.enter_context(_module_in_place(_Launchers(_load(library), device)))
        stack.enter_context(accept_cpu_tensors("cuda"))
        yield device.run


@contextmanager
def _module_in_place(module: Any) -> Iterator[None]:
    from fusetune.ops import _cuda

    before = _cuda.MODULE
    _cuda.MODULE = module
    try:
        yield
    finally:
        _cuda.MODULE = before


@cache
def _load(library: Path) -> ModuleType:
    """The extension module in `library`; the file is named after it."""
    # pybind11 gives a module that has the same full name as an earlier one that one's functions.
    name = f"fusetune.sim.{library.parent.name}.{library.stem}"
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Launchers:
    """The extension module, whose functions raise what went wrong in the simulated kernels."""

    def __init__(self, module: ModuleType, device: Device) -> None:
        self._module = module
        self._device = device

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        if not callable(function):
            return function

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            finally:
                self._device.raise_error()

        return call


class Device:
    """The device of one library: executes its launches and keeps the error of a failed one."""

    def __init__(self, arch: int) -> None:
        self.run = Run(arch)
        self.tensors = _Tensors()
        self._error: BaseException | None = None

    def launch(
        self, image: int, name: bytes, grid: Any, block: Any, smem: int, addresses: Any
    ) -> int:
        """The runtime's callback: 0, or an error code."""
        try:
            program = _program(image)
            kernel = name.decode()
            sizes = program.parameters(kernel)
            args = [ctypes.string_at(addresses[i], size) for i, size in enumerate(sizes)]
            dims = (grid[0], grid[1], grid[2]), (block[0], block[1], block[2])
            memory = self.tensors.named_by(args)
            counts = program.launch(kernel, *dims, args, smem=smem, memory=memory)
            self.run.launches.append(Launch(kernel, *dims, counts))
        except BaseException as error:  # nothing may be raised through the C++ of the launcher
            self._error = error
            return _LAUNCH_FAILED
        return 0

    def raise_error(self) -> None:
        """Raises what a launch has failed with since the last call."""
        error, self._error = self._error, None
        if error is not None:
            raise error


@contextmanager
def device_of(library: Path, arch: int) -> Iterator[Device]:
    """Executes the launches of a library that `cuda_build.build` has made."""
    device = Device(arch)
    callback = _LaunchCallback(device.launch)
    start = ctypes.CDLL(str(library)).fusetune_sim_start
    start(arch, callback)
    before = torch.Tensor.data_ptr
    torch.Tensor.data_ptr = device.tensors.data_ptr  # type: ignore[method-assign]
    try:
        yield device
    finally:
        torch.Tensor.data_ptr = before  # type: ignore[method-assign]
        start(arch, None)


@cache
def _program(image: int) -> Program:
    """The PTX in a fat binary of this process (which stays loaded)."""
    # struct {uint32 magic; uint16 version, header; uint64 size of what follows the header}
    header, size = (
        int.from_bytes(ctypes.string_at(image + at, n), "little") for at, n in ((6, 2), (8, 8))
    )
    text = re.search(rb"\.version [^\0]*", ctypes.string_at(image, header + size))
    if text is None:
        raise RuntimeError("the launchers were compiled without PTX")
    return Program(text.group().decode())


_data_ptr = torch.Tensor.data_ptr


class _Tensors:
    """The tensors that launches may use: found by the addresses that the host code asked for.

    A launcher gets bare addresses. Whose they are is known from the calls of `data_ptr` during the
    simulation; an address taken before it (and kept, as for weights) is looked for among all
    tensors that Python knows.
    """

    def __init__(self) -> None:
        self._known: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()

    @property
    def data_ptr(self) -> Any:
        """A `Tensor.data_ptr` that notes whose address was asked for."""

        def data_ptr(tensor: torch.Tensor) -> int:
            address = _data_ptr(tensor)
            known = self._known.get(address)
            if known is None or _span(known)[1] < _span(tensor)[1]:
                self._known[address] = tensor
            return address

        return data_ptr

    def named_by(self, args: list[bytes]) -> list[torch.Tensor]:
        """The tensors that addresses in kernel arguments (also in structs) lie in."""
        found: dict[int, torch.Tensor] = {}
        for arg in args:
            for at in range(0, len(arg) - 7, 8):
                address = int.from_bytes(arg[at : at + 8], "little")
                if _MAPPED <= address < _HOST_END:
                    found.update((id(tensor), tensor) for tensor in self._holding(address))
        return list(found.values())

    def _holding(self, address: int) -> list[torch.Tensor]:
        known = [t for t in list(self._known.values()) if _holds(t, address)]
        if known:
            return known
        # type(): asking some objects for their __class__ has side effects. Subclasses, fake tensors
        # among them, are left out: they may have no address.
        everything = (t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))
        found = [t for t in everything if _is_plain(t) and _holds(t, address)]
        if found:
            self._known[_data_ptr(found[0])] = found[0]
        return found[:1]


# Numbers below or above are no addresses of memory that a program has.
_MAPPED, _HOST_END = 1 << 20, 1 << 47


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.layout is torch.strided


def _holds(tensor: torch.Tensor, address: int) -> bool:
    start, end = _span(tensor)
    return start <= address < end


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First address of a tensor, and the one past its last element."""
    start = _data_ptr(tensor)
    if tensor.numel() == 0:
        return start, start
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()
