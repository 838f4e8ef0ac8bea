"""dora_norm: the row norms of W + scaling B A, by which DoRA scales. Not differentiable: detached,
as in PEFT."""

from __future__ import annotations

from typing import Any

import torch

from fusetune.ops import _check, _cpu, _triton
from fusetune.ops._registry import Impl, Op, define, plain
from fusetune.ops._weight import ARGUMENTS, SCHEMA, Weight, flatten, unflatten
from fusetune.reference import dora_norm as reference

Tensor = torch.Tensor
_ROWS_TO_COPY = 64  # at a time, of a weight that is stored transposed: no second one exists


def dora_norm(weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """|| W_i + scaling (B A)_i ||_2 for every row, fp32 [N] (float64 for float64 adapters).

    weight: [N, K], a tensor or a `QuantizedWeight`; lora_A: [r, K]; lora_B: [N, r]. No gradient.
    On a GPU a 4-bit weight whose K is not a multiple of 8 is left to the reference, which decodes
    the whole of it: the kernel reads eight codes at a time, of one row.
    Raises TypeError or ValueError, naming the argument, for what does not fit.
    """
    _check.check_update(weight, lora_A, lora_B)
    lora_A, lora_B = lora_A.detach(), lora_B.detach()
    if isinstance(weight, Tensor):
        weight = weight.detach()
    if torch.compiler.is_compiling() or not plain(lora_A):
        norm: Tensor = _op(*flatten(weight), lora_A, lora_B, float(scaling))
        return norm
    return _run_on(weight, lora_A, lora_B, float(scaling))


# --- implementations ------------------------------------------------------------------------------


def _triton_norm(weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    if not _triton.has_whole_words(weight):
        return reference.dora_norm(weight, lora_A, lora_B, scaling)
    from fusetune._triton.dora_norm import launch_dora_norm

    norm = torch.empty(lora_B.shape[0], dtype=torch.float32, device=lora_B.device)
    with _triton.on(norm.device):
        a, b = _triton.adapter(lora_A), _triton.adapter(lora_B)
        arch = _triton.capability(norm.device)
        launch_dora_norm(_triton.rows_of(weight), a, b, scaling, norm, arch=arch)
    return norm


def _cpu_norm(weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    (n, r), k = lora_B.shape, lora_A.shape[1]
    a, b = _cpu.fp32(lora_A), _cpu.fp32(lora_B)
    norm = _cpu.empty(n, dtype=torch.float32)
    dense = weight if isinstance(weight, Tensor) else None
    gaps = dense is not None and (dense.stride(1) != 1 or dense.is_neg())
    step = _ROWS_TO_COPY if gaps else max(n, 1)  # the kernel reads contiguous rows
    for first in range(0, n, step):
        part, count = weight, min(step, n - first)
        if gaps and dense is not None:
            part = dense[first : first + count].contiguous().resolve_neg()
        tail = (a.data_ptr(), b[first:].data_ptr(), r, scaling, norm[first:].data_ptr())
        _cpu.kernels().dora_norm(*_cpu.weight(part), count, k, *tail)
    return norm


OP = Op(
    "dora_norm",
    Impl("triton", _triton_norm, _triton.supports_mixed, 20),
    Impl("cpu", _cpu_norm, _cpu.supports("dora_norm"), 10),
    Impl("reference", reference.dora_norm, lambda case: None, 0),
)


def _run_on(weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    adapter = torch.promote_types(lora_A.dtype, lora_B.dtype)
    dense = weight.dtype if isinstance(weight, Tensor) else None
    norm: Tensor = OP.run(lora_A.device.type, adapter, dense)(weight, lora_A, lora_B, scaling)
    return norm


# --- torch.library --------------------------------------------------------------------------------


def _run(*args: Any) -> Tensor:
    return _run_on(unflatten(args[:ARGUMENTS]), *args[ARGUMENTS:])


def _fake(*args: Any) -> Tensor:
    lora_A, lora_B = args[ARGUMENTS : ARGUMENTS + 2]
    double = torch.float64 in (lora_A.dtype, lora_B.dtype)
    return lora_B.new_empty(lora_B.shape[0], dtype=torch.float64 if double else torch.float32)


_op = define(
    f"dora_norm({SCHEMA}, Tensor lora_A, Tensor lora_B, float scaling) -> Tensor", _run, _fake
)
