"""What a stretch of code hands to the processor: operators of torch, and kernels of ours.

An operator counts where it works on data: not one that makes a view, or memory without content.
torch's own fused operators, such as attention, and those of other libraries count as one each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusetune import _native

Tensor = torch.Tensor
KERNEL = "fusetune."  # before the name of a kernel of ours


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each operator and kernel was called, on the CPU, backward passes included."""
    calls: Counter[str] = Counter()
    with ExitStack() as stack:
        if _native.C is not None:
            stack.enter_context(mock.patch.object(_native, "C", _Kernels(_native.C, calls)))
        stack.enter_context(ops_as_without_a_mode())
        stack.enter_context(_Operators(calls))
        yield calls


def kernels(calls: Counter[str]) -> int:
    """How many of the calls are of our kernels."""
    return sum(count for name, count in calls.items() if name.startswith(KERNEL))


def ops_as_without_a_mode() -> Any:
    """Ops of ours go the way they go without a mode: what is inside them is seen."""
    return mock.patch("torch._C._len_torch_dispatch_stack", return_value=0)


class _Operators(TorchDispatchMode):
    def __init__(self, calls: Counter[str]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = tensors((*args, *(kwargs or {}).values()))
        before = [storage_of(t) for t in inputs]
        result = func(*args, **(kwargs or {}))
        outputs = tensors([result])
        if outputs and not is_view(func, before, outputs) and not is_bare(func):
            self.calls[str(func.overloadpacket)] += 1
        return result


class _Kernels:
    """The native module, whose kernels are counted; what only asks or sets something is not."""

    def __init__(self, module: Any, calls: Counter[str]) -> None:
        self._module = module
        self._calls = calls
        self._kernels = {name for name in dir(module) if _is_kernel(module, name)}

    def __getattr__(self, name: str) -> Any:
        if name in self._kernels:
            self._calls[KERNEL + name] += 1
        return getattr(self._module, name)


def _is_kernel(module: Any, name: str) -> bool:
    try:
        module.has(name)
    except ValueError:  # "no kernel is called ..."
        return False
    return True


def is_view(func: Any, before: list[int], outputs: list[Tensor]) -> bool:
    """Whether an operator only looks at memory it was given. before: `storage_of` of its inputs."""
    changes = func._schema.is_mutable and torch.Tag.inplace_view not in func.tags
    return storage_of(outputs[0]) in before and not changes


def is_bare(func: Any) -> bool:
    """Whether it gives memory of any content."""
    return "empty" in func.overloadpacket.__name__


def storage_of(tensor: Tensor) -> int:
    """What views of it share."""
    return tensor.untyped_storage().data_ptr()


def tensors(values: Any) -> list[Tensor]:
    flat: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            flat.append(value)
        elif isinstance(value, (list, tuple)):
            flat += tensors(value)
    return flat
