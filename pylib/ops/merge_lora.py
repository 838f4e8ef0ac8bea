"""merge_lora: a weight with its LoRA adapter in it. Not differentiable."""

from __future__ import annotations

from typing import Any

import torch

from fusetune.ops import _check, _cpu, _triton
from fusetune.ops._registry import Impl, Op, define, plain
from fusetune.ops._weight import ARGUMENTS, SCHEMA, Weight, flatten, unflatten
from fusetune.ops.dequantize_4bit import dequantize_4bit
from fusetune.quantized_weight import QuantizedWeight
from fusetune.reference import merge_lora as reference

Tensor = torch.Tensor


def merge_lora(
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """W + scaling B A, dense [N, K], in `dtype` (the weight's own where it is None).

    weight: [N, K], a tensor or a `QuantizedWeight`; lora_A: [r, K]; lora_B: [N, r]; all float16,
    bfloat16, float32 or float64, not necessarily the same. Nothing is changed in place, and no
    gradient is taken.

    For evaluation with a merged base, if you ask for it: nothing in fusetune merges by itself,
    because that rounds. Product and sum are taken in fp32 and rounded to `dtype` once: by up to
    2^-8 of an element in bfloat16, so that nothing is left of an update below 2^-9, while
    `lora_linear` adds it to the output before that is rounded. PEFT's `merge` rounds the update,
    then the sum, and quantises what was a 4-bit weight anew.

    A lora_bias is merged as bias + scaling lora_bias, which is the caller's to do. (PEFT's merge
    into a 4-bit layer leaves the scaling out.)

    On a GPU a 4-bit weight whose K is not a multiple of 8 is left to the reference, as in
    `dora_norm`. Raises TypeError or ValueError, naming the argument, for what does not fit.
    """
    _check.check_update(weight, lora_A, lora_B)
    if dtype is None:
        dtype = weight.dtype
    if dtype not in _check.FLOATS:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    lora_A, lora_B = lora_A.detach(), lora_B.detach()
    if isinstance(weight, Tensor):
        weight = weight.detach()
    if torch.compiler.is_compiling() or not plain(lora_A):
        merged: Tensor = _op(*flatten(weight), lora_A, lora_B, float(scaling), dtype)
        return merged
    return _run_on(weight, lora_A, lora_B, float(scaling), dtype)


# --- implementations ------------------------------------------------------------------------------


def _triton_merge(
    weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype
) -> Tensor:
    if not _triton.has_whole_words(weight):
        return reference.merge_lora(weight, lora_A, lora_B, scaling, dtype)
    from fusetune._triton.dequantize_4bit import launch_rows

    out = torch.empty(weight.shape, dtype=dtype, device=lora_A.device)
    with _triton.on(out.device):
        a, b = _triton.adapter(lora_A), _triton.adapter(lora_B)
        source = _triton.rows_of(weight)
        arch = _triton.capability(out.device)
        launch_rows(source, *out.shape, lora_A=a, lora_B=b, scaling=scaling, out=out, arch=arch)
    return out


def _cpu_merge(
    weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype
) -> Tensor:
    if isinstance(weight, QuantizedWeight):
        dense = dequantize_4bit(weight, torch.float32)
    else:
        contiguous = torch.contiguous_format
        dense = weight.to(torch.float32, copy=True, memory_format=contiguous)
    return dense.addmm_(lora_B.float(), lora_A.float(), alpha=scaling).to(dtype)


OP = Op(
    "merge_lora",
    Impl("triton", _triton_merge, _triton.supports_mixed, 20),
    Impl("cpu", _cpu_merge, _cpu.supports("dequantize_4bit"), 10),
    Impl("reference", reference.merge_lora, lambda case: None, 0),
)


def _run_on(
    weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype
) -> Tensor:
    dense = weight.dtype if isinstance(weight, Tensor) else None
    double = torch.float64 in (lora_A.dtype, lora_B.dtype)
    run = OP.run(lora_A.device.type, torch.float64 if double else dtype, dense)
    merged: Tensor = run(weight, lora_A, lora_B, scaling, dtype)
    return merged


# --- torch.library --------------------------------------------------------------------------------


def _run(*args: Any) -> Tensor:
    return _run_on(unflatten(args[:ARGUMENTS]), *args[ARGUMENTS:])


def _fake(*args: Any) -> Tensor:
    lora_A, lora_B, _, dtype = args[ARGUMENTS:]
    merged: Tensor = lora_B.new_empty(lora_B.shape[0], lora_A.shape[1], dtype=dtype)
    return merged


_op = define(
    f"merge_lora({SCHEMA}, Tensor lora_A, Tensor lora_B, float scaling, ScalarType dtype) "
    "-> Tensor",
    _run,
    _fake,
)
