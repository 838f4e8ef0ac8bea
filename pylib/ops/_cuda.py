"""Calls into the CUDA kernels: whether they can run, addresses for tensors, the stream, workspaces.

The functions take matrices whose rows are contiguous (`as_rows`) and arguments that have been
checked. They launch on the current stream of the tensors' device and wait for nothing; memory comes
from torch's allocator, so that a CUDA graph can capture them.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch

from fusetune.ops._registry import Case
from fusetune.ops._weight import Weight
from fusetune.quantized_weight import QuantizedWeight
from fusetune.reference.codebook import codebook
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
_ALIGNMENT = 16  # bytes a load takes

Tensor = torch.Tensor
Tail = tuple[Tensor, Tensor, float]  # left [M, r] fp32, right, factor


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
    if weight.packed.data_ptr() % _ALIGNMENT:
        return f"the packed weight is not aligned to {_ALIGNMENT} bytes"
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
    tail: Tail | None = None,
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
    rows = _aligned(rows)
    bias32 = None if bias is None else _fp32(bias)
    low = _low_rank(tail)
    with _on(rows.device):
        code = DTYPE_CODES[rows.dtype]
        splits = splits or _module().linear_4bit_splits(m, n, k, code)
        workspace = _workspace(splits, y)
        _check(
            "linear_4bit",
            _module().linear_4bit(
                (rows.data_ptr(), rows.stride(0), code),
                m,
                _weight(weight),
                _addresses(low),
                _address(bias32),
                y.data_ptr(),
                _address(workspace),
                splits,
                _stream(rows.device),
            ),
        )
    return y


def linear_4bit_dx(
    dy: Tensor,
    weight: QuantizedWeight,
    tail: Tail | None = None,
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
    dy = _aligned(torch.nn.functional.pad(dy, (0, -n % 8)) if n % 8 else dy)
    low = _low_rank(tail)
    drop = None if dropout is None else (dropout[1].data_ptr(), *threshold_and_scale(dropout[0]))
    with _on(dy.device):
        splits = splits or _module().linear_4bit_dx_splits(m, n, k)
        workspace = _workspace(splits, dx)
        _check(
            "linear_4bit_dx",
            _module().linear_4bit_dx(
                (dy.data_ptr(), dy.stride(0), DTYPE_CODES[dy.dtype]),
                m,
                _weight(weight),
                _addresses(low),
                drop,
                dx.data_ptr(),
                _address(workspace),
                splits,
                _stream(dy.device),
            ),
        )
    return dx


def dequantize_4bit(weight: QuantizedWeight, out: Tensor) -> None:
    """Writes the weight's values to `out`, contiguous, float32, float16 or bfloat16."""
    with _on(out.device):
        done = _module().dequantize_4bit(
            _weight(weight), out.data_ptr(), DTYPE_CODES[out.dtype], _stream(out.device)
        )
    _check("dequantize_4bit", done)


# --- arguments ------------------------------------------------------------------------------------


def _weight(w: QuantizedWeight) -> tuple[Any, ...]:
    """The launchers' description of a weight; made once and kept with it."""
    known: tuple[Any, ...] | None = w.__dict__.get("_cuda")
    if known is not None:
        return known
    rows = w.shape[0] if w.shape else 1
    described = (
        w.packed.data_ptr(),
        codebook(w.quant_type, w.device).data_ptr(),
        0 if w.nested else w.absmax.data_ptr(),
        w.absmax.data_ptr() if w.nested else 0,
        _address(w.nested_code),
        _address(w.nested_absmax),
        _address(w.nested_offset),
        w.nested_blocksize,
        w.blocksize,
        rows,
        w.numel() // rows if rows else 0,
    )
    object.__setattr__(w, "_cuda", described)
    return described


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_neg().float().contiguous()


def _low_rank(tail: Tail | None) -> Tail | None:
    return None if tail is None else (_fp32(tail[0]), _fp32(tail[1]), tail[2])


def _addresses(tail: Tail | None) -> tuple[int, int, int, float] | None:
    if tail is None:
        return None
    left, right, factor = tail
    return left.data_ptr(), right.data_ptr(), left.shape[1], factor


def _aligned(rows: Tensor) -> Tensor:
    """`rows`, or a copy of it, such that loads of 16 bytes can start at every row."""
    pitch = rows.stride(0) * rows.element_size()
    if rows.data_ptr() % _ALIGNMENT == 0 and (pitch % _ALIGNMENT == 0 or rows.shape[0] == 1):
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def _workspace(splits: int, like: Tensor) -> Tensor | None:
    if splits == 1:
        return None
    return torch.empty((splits, like.numel()), dtype=torch.float32, device=like.device)


def _on(device: torch.device) -> Any:
    """Makes `device` current where it is a GPU that is not."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _stream(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    stream: int = torch.cuda.current_stream(device).cuda_stream
    return stream


def _check(op: str, code: int) -> None:
    if code:
        raise RuntimeError(f"{op}: CUDA error {code}: {_module().error_string(code)}")
