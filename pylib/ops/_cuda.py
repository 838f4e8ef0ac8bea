"""Calls into the CUDA kernels, and whether they can run.

The functions take matrices whose rows are contiguous (`as_rows`) and arguments that have been
checked. They launch on the current stream of the tensors' device and wait for nothing; memory comes
from torch's allocator, so that a CUDA graph can capture them.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch

from fusetune.ops import _cuda_arguments as arguments
from fusetune.ops._registry import Case
from fusetune.ops._weight import Weight
from fusetune.quantized_weight import QuantizedWeight
from fusetune.reference.dropout import threshold_and_scale

DEVICES = {"cuda"}  # device types of tensors that the kernels take
MODULE: Any = None  # the native module once it is needed and usable

# Rows above which the weight is decoded for one large matmul. Predicted, not measured:
# `python -m benchmarks.bound --rows` has the bounds of both if a kernel's work overlaps perfectly,
# and if its two longest resources do not overlap at all. Where these differ about who wins, their
# mean decides: 256 on sm_80 and sm_90, 64 on sm_100; elsewhere at least 256. sm_75 has no kernel
# that adds LoRA's tail to a large matmul: there the packed weight is used at every size, for less
# than half of the bytes (4096 rows: 0.94 to 1.44 of the other way's time).
_MAX_ROWS = {75: 65535, 100: 64, 103: 64}
_MAX_ROWS_ELSEWHERE = 256
_MAX_ROWS_FP32 = 8
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MULTIPLE = 32  # of columns: what one lane decodes lies in one block of absmax

Tensor = torch.Tensor


@cache
def _load() -> tuple[Any, str | None]:
    """(module, None), or (None, why the kernels cannot be used)."""
    try:
        module = importlib.import_module("fusetune._cuda")
    except ImportError as error:
        return None, f"the CUDA kernels are not built (that takes nvcc): {error}"
    count, code = module.device_count()
    if code:
        return None, f"CUDA finds no device: {module.error_string(code)}"
    return (module, None) if count else (None, "CUDA finds no device")


def reason() -> str | None:
    """Why the kernels cannot be used on this machine; None where they can."""
    return None if MODULE is not None else _load()[1]


def _module() -> Any:
    global MODULE
    if MODULE is None:
        MODULE = _load()[0]
    return MODULE


def supports(case: Case) -> str | None:
    """`Impl.supports` of ops that the kernels carry out whatever the shape."""
    if case.device not in DEVICES:
        return f"the tensors are on {case.device}"
    if case.dtype not in DTYPE_CODES:
        return f"no kernel for {case.dtype}"
    if case.weight is not None:
        return "the weight is dense"
    return reason() or _no_code(_capability())


def reads(weight: QuantizedWeight) -> str | None:
    """Why the kernels cannot read this weight; None where they can."""
    if weight.nested_blocksize & (weight.nested_blocksize - 1):
        return f"nested_blocksize {weight.nested_blocksize} is not a power of two"
    return None


def refuses(
    m: int, n: int, k: int, dtype: torch.dtype, weight: Weight, rank: int = 0, *, dx: bool = False
) -> str | None:
    """Why `linear_4bit` (`linear_4bit_dx`) cannot do M x N x K; None where it can.

    Any `rank` will do: the tail is a loop over blocks of 16.
    """
    if not isinstance(weight, QuantizedWeight):
        return "the weight is dense"
    if dtype not in DTYPE_CODES:
        return f"no kernel for {dtype}"
    if dtype == torch.float32 and dx:
        return "no kernel for the gradient in torch.float32"
    if 0 in (n, k):
        return f"an empty weight [{n}, {k}]"
    if k % _MULTIPLE:
        return f"K = {k} is not a multiple of {_MULTIPLE}"
    if (why := reads(weight)) is not None:
        return why
    if weight.packed.data_ptr() % arguments.ALIGNMENT:
        return f"the packed weight is not aligned to {arguments.ALIGNMENT} bytes"
    if (why := reason()) is not None:
        return why
    capability = _capability(weight.device)
    if dtype == torch.bfloat16 and capability < 80:
        return "this GPU's tensor cores do not take torch.bfloat16"
    if m > (limit := max_rows(capability, dtype)):
        return f"{m} rows, more than {limit}"
    return _no_code(capability)


def max_rows(capability: int, dtype: torch.dtype) -> int:
    """For how many rows the kernels over the packed weight are used."""
    if dtype == torch.float32:
        return _MAX_ROWS_FP32
    return _MAX_ROWS.get(capability, _MAX_ROWS_ELSEWHERE)


@cache
def _capability_of(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def _capability(device: torch.device | None = None) -> int:
    """Ten times the major plus the minor capability of a device; None: of the current one."""
    if device is not None and device.type == "cuda":
        return _capability_of(device.index)
    capability: int = _module().capability()
    return capability


def _no_code(capability: int) -> str | None:
    if _module().has_code(capability):
        return None
    return f"the CUDA kernels are not built for sm_{capability}"


# --- the kernels ----------------------------------------------------------------------------------


def linear_4bit(
    rows: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    tail: arguments.Tail | None = None,
    splits: int = 0,
) -> Tensor:
    """rows [M, K] weight^T + factor s lora_B^T + bias: y [M, N] in rows' dtype.

    tail: (s fp32 [M, r], lora_B [N, r], factor). splits: parts of K summed apart; 0 chooses.
    What `refuses` refuses must not be asked for.
    """
    m, (n, k) = rows.shape[0], weight.shape
    y = torch.empty((m, n), dtype=rows.dtype, device=rows.device)
    if m == 0:
        return y
    rows = arguments.aligned(rows)
    bias32 = None if bias is None else arguments.fp32(bias)
    low = arguments.low_rank(tail)
    with arguments.on(rows.device):
        code = DTYPE_CODES[rows.dtype]
        splits = splits or _module().linear_4bit_splits(m, n, k, code)
        workspace = arguments.workspace(splits, y)
        _check(
            "linear_4bit",
            _module().linear_4bit(
                (rows.data_ptr(), rows.stride(0), code),
                m,
                arguments.described(weight),
                arguments.addresses(low),
                arguments.address(bias32),
                y.data_ptr(),
                arguments.address(workspace),
                splits,
                arguments.stream(rows.device),
            ),
        )
    return y


def linear_4bit_dx(
    dy: Tensor,
    weight: QuantizedWeight,
    tail: arguments.Tail | None = None,
    dropout: tuple[float, Tensor] | None = None,
    splits: int = 0,
) -> Tensor:
    """dy [M, N] weight + mask (factor ds lora_A): dx [M, K] in dy's dtype, float16 or bfloat16.

    tail: (ds fp32 [M, r], lora_A [r, K], factor). dropout: (p, seed) of the tail's mask, which
    multiplies kept elements by 1 / (1 - p). splits: parts of N summed apart; 0 chooses.
    """
    m, (n, k) = dy.shape[0], weight.shape
    dx = torch.empty((m, k), dtype=dy.dtype, device=dy.device)
    if m == 0:
        return dx
    dy = arguments.aligned(torch.nn.functional.pad(dy, (0, -n % 8)) if n % 8 else dy)
    low = arguments.low_rank(tail)
    drop = None if dropout is None else (dropout[1].data_ptr(), *threshold_and_scale(dropout[0]))
    with arguments.on(dy.device):
        splits = splits or _module().linear_4bit_dx_splits(m, n, k)
        workspace = arguments.workspace(splits, dx)
        _check(
            "linear_4bit_dx",
            _module().linear_4bit_dx(
                (dy.data_ptr(), dy.stride(0), DTYPE_CODES[dy.dtype]),
                m,
                arguments.described(weight),
                arguments.addresses(low),
                drop,
                dx.data_ptr(),
                arguments.address(workspace),
                splits,
                arguments.stream(dy.device),
            ),
        )
    return dx


def dequantize_4bit(weight: QuantizedWeight, out: Tensor) -> None:
    """Writes the weight's values to `out`, contiguous, float32, float16 or bfloat16."""
    with arguments.on(out.device):
        done = _module().dequantize_4bit(
            arguments.described(weight),
            out.data_ptr(),
            DTYPE_CODES[out.dtype],
            arguments.stream(out.device),
        )
    _check("dequantize_4bit", done)


def _check(op: str, code: int) -> None:
    if code:
        raise RuntimeError(f"{op}: CUDA error {code}: {_module().error_string(code)}")
