"""Calls into the Triton kernels: whether they can run, and arguments as they take them.

Triton is imported when an op is first asked whether it could use it, not with fusetune.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from fusetune.ops._registry import Case
from fusetune.quantized_weight import QuantizedWeight
from fusetune.reference.codebook import codebook
from fusetune.reference.dropout import threshold_and_scale

if TYPE_CHECKING:
    from fusetune._triton.dequantize_4bit import Packed

Tensor = torch.Tensor

DEVICES = {"cuda"}  # device types of tensors that the kernels take
DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))
OLDEST = (3, 5)  # the Triton that the oldest supported torch comes with


@cache
def _load() -> str | None:
    """Why Triton cannot be used, None where it can."""
    try:
        import triton
    except ImportError as error:
        return f"Triton is not installed: {error}"
    version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
    if version < OLDEST:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}"
    return None


@cache
def _capability_of(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(device: torch.device | None = None) -> int:
    """80, 86, 90, ... of a device, or of the current one. On the CPU: of what is simulated."""
    if device is None and "cpu" not in DEVICES:
        return _capability_of(torch.cuda.current_device())
    if device is not None and device.type == "cuda":
        return _capability_of(device.index)
    from triton.runtime import driver

    arch: int = driver.active.get_current_target().arch
    return arch


def reason() -> str | None:
    """Why the kernels cannot be used on this machine; None where they can."""
    if (why := _load()) is not None:
        return why
    if "cpu" not in DEVICES and not torch.cuda.is_available():
        return "torch finds no GPU"
    arch = capability()
    if arch < 75:
        return f"no Triton kernel is tested on sm_{arch}, older than sm_75"
    return None


def tensor_cores(device: torch.device) -> bool:
    """Whether Triton's matrix products run on tensor cores; on Turing they are fp32 FMAs."""
    return capability(device) >= 80


def supports(case: Case) -> str | None:
    """`Impl.supports` of ops that the kernels carry out whatever the shape."""
    if case.device not in DEVICES:
        return f"the tensors are on {case.device}"
    if case.dtype not in DTYPES:
        return f"no kernel for {case.dtype}"
    if case.weight not in (None, case.dtype):
        return f"x is {case.dtype}, the dense weight {case.weight}"
    if (why := reason()) is not None:
        return why
    if case.dtype == torch.bfloat16 and capability() < 80:
        return f"sm_{capability()} has no {case.dtype}"
    return None


def supports_mixed(case: Case) -> str | None:
    """`supports` of kernels that take a dense weight of another dtype than case.dtype."""
    if case.weight is not None and case.weight not in DTYPES:
        return f"no kernel for {case.weight}"
    return supports(case._replace(weight=None))


def packed(w: QuantizedWeight) -> Packed:
    """The kernels' description of a 4-bit weight; made once and kept with it."""
    from fusetune._triton.dequantize_4bit import Packed

    known: Packed | None = w.__dict__.get("_triton")
    if known is not None:
        return known
    described = Packed(
        # Codes are read in words of four bytes.
        w.packed if w.packed.data_ptr() % 4 == 0 else w.packed.clone(),
        codebook(w.quant_type, w.device),
        w.absmax,
        w.nested_absmax,
        w.nested_code,
        w.nested_offset,
        w.blocksize,
        w.nested_blocksize,
    )
    object.__setattr__(w, "_triton", described)
    return described


def has_whole_words(weight: Tensor | QuantizedWeight) -> bool:
    """Whether `launch_rows` takes it: no word of eight codes may cross rows."""
    return isinstance(weight, Tensor) or weight.shape[1] % 8 == 0


def rows_of(weight: Tensor | QuantizedWeight) -> Packed | Tensor:
    """A weight [N, K] as `launch_rows` takes it; a dense one is copied where it has to be."""
    if isinstance(weight, QuantizedWeight):
        return packed(weight)
    weight = weight.resolve_neg()
    return weight if weight.stride(1) == 1 else weight.contiguous()


def adapter(parameter: Tensor) -> Tensor:
    """A small parameter as the kernels take it: contiguous, at most fp32. Itself where it is so."""
    parameter = parameter.detach().resolve_neg()
    if parameter.dtype not in DTYPES:
        parameter = parameter.float()
    return parameter.contiguous()


def mask(p: float, seed: Tensor | None) -> dict[str, Any]:
    """The launchers' arguments for a dropout of probability p."""
    if seed is None:
        return {}
    threshold, factor = threshold_and_scale(p)
    return {"threshold": threshold, "factor": factor}


def dropout(rows: Tensor, kept: Tensor, p: float, seed: Tensor, rest: Tensor | None = None) -> None:
    """kept = rows, zeros where they are dropped; rest = rows - kept / (1 - p). Both contiguous."""
    from fusetune._triton.dropout import launch_dropout

    if rows.numel():
        with on(rows.device):
            launch_dropout(rows, kept, seed, **mask(p, seed), rest=rest)


def on(device: torch.device) -> Any:
    """Makes `device` current where it is a GPU that is not: Triton launches on the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def dequantize_4bit(w: QuantizedWeight, out: Tensor) -> None:
    """Writes the weight's values to `out`, contiguous, float32, float16 or bfloat16."""
    from fusetune._triton.dequantize_4bit import launch_dequantize_4bit

    with on(out.device):
        launch_dequantize_4bit(packed(w), out)
