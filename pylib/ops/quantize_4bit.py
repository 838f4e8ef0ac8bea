"""quantize_4bit: a dense tensor to a `QuantizedWeight`."""

from __future__ import annotations

import torch

from fusetune.ops import _cpu
from fusetune.ops._registry import Impl, Op, define, plain
from fusetune.quantized_weight import QuantizedWeight
from fusetune.reference import quantize_4bit as reference
from fusetune.reference.codebook import BLOCKSIZES, QUANT_TYPES, dynamic_map

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def quantize_4bit(
    weight: torch.Tensor,
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = False,
) -> QuantizedWeight:
    """Quantises `weight`, of any shape, to 4 bits in blocks of `blocksize` row-major elements.

    weight: float32, float16 or bfloat16. quant_type: "nf4" or "fp4". blocksize: a power of two
    from 32 to 4096. double_quant: also quantises absmax, to 8 bits in blocks of 256.
    The result equals bitsandbytes' (QLoRA, arXiv:2305.14314) bit for bit.

    Raises TypeError for another dtype, ValueError for another quant_type or blocksize, or where
    `weight` holds NaN or infinity.
    """
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if weight.dtype not in _DTYPES:
        raise TypeError(f"weight must be float32, float16 or bfloat16, got {weight.dtype}")
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type must be one of {QUANT_TYPES}, got {quant_type!r}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {blocksize!r}")
    weight = weight.detach().resolve_neg()
    run = _run if plain(weight) and not torch.compiler.is_compiling() else _op
    packed, absmax = run(weight, quant_type, blocksize)
    fields: dict[str, object] = {"packed": packed, "absmax": absmax}
    if double_quant and absmax.numel():
        if not absmax.isfinite().all():
            raise ValueError("weight holds NaN or infinity")
        code, nested_absmax, offset = reference.quantize_absmax(absmax)
        fields |= {
            "absmax": code,
            "nested_absmax": nested_absmax,
            "nested_code": dynamic_map(absmax.device).clone(),
            "nested_offset": offset,
        }
    elif not absmax.isfinite().all():
        raise ValueError("weight holds NaN or infinity")
    return QuantizedWeight(
        **fields,  # type: ignore[arg-type]
        quant_type=quant_type,
        blocksize=blocksize,
        shape=weight.shape,
        dtype=weight.dtype,
    )


def _cpu_quantize(
    weight: torch.Tensor, quant_type: str, blocksize: int
) -> tuple[torch.Tensor, torch.Tensor]:
    flat = weight.contiguous()
    n = flat.numel()
    packed = _cpu.empty((n + 1) // 2, dtype=torch.uint8)
    absmax = _cpu.empty(-(-n // blocksize), dtype=torch.float32)
    _cpu.kernels().quantize_4bit(
        flat.data_ptr(),
        _cpu.DTYPE_CODES[flat.dtype],
        n,
        _cpu.QUANT_TYPE_CODES[quant_type],
        blocksize,
        packed.data_ptr(),
        absmax.data_ptr(),
    )
    return packed, absmax


OP = Op(
    "quantize_4bit",
    Impl("cpu", _cpu_quantize, _cpu.supports("quantize_4bit"), 10),
    Impl("reference", reference.quantize_4bit, lambda case: None, 0),
)


def _run(
    weight: torch.Tensor, quant_type: str, blocksize: int
) -> tuple[torch.Tensor, torch.Tensor]:
    run = OP.run(weight.device.type, weight.dtype, None)
    packed, absmax = run(weight, quant_type, blocksize)
    return packed, absmax


def _fake(
    weight: torch.Tensor, quant_type: str, blocksize: int
) -> tuple[torch.Tensor, torch.Tensor]:
    n = weight.numel()
    packed = weight.new_empty((n + 1) // 2, dtype=torch.uint8)
    absmax = weight.new_empty((n + blocksize - 1) // blocksize, dtype=torch.float32)
    return packed, absmax


_op = define(
    "quantize_4bit(Tensor weight, str quant_type, int blocksize) -> (Tensor, Tensor)", _run, _fake
)
