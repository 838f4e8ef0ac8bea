"""lora_embedding: a look-up of embeddings with a LoRA adapter, the adapter added in place.

PEFT makes a tensor of the result's size three times more: the product, its scaled copy and the sum;
with a 16-bit table all of them in fp32. Here the adapter is added to what was looked up, which is
kept by nobody, a block of rows at a time where it has to be widened. For the backward pass the
tokens and h = A[:, ids]^T ([M, r]) are kept; A's gradient is summed token by token in a fixed
order, for the tokens that occur.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding

from fusetune.ops import _check, _cpu, _lora_linear_cpu, _triton
from fusetune.ops._lora_arguments import fold_scaling
from fusetune.ops._lora_linear_gpu import ByTriton
from fusetune.ops._registry import Impl, Op, define, plain
from fusetune.ops._weight import as_rows
from fusetune.reference import lora_embedding as reference
from fusetune.reference.linear_4bit import accumulate_dtype

Tensor = torch.Tensor
Grads = tuple[Tensor | None, Tensor | None]
INTEGERS = (torch.int64, torch.int32)
_BLOCK = 256  # rows that are widened to fp32 at a time on a CPU


def lora_embedding(
    input_ids: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    *,
    scale: float = 1.0,
    padding_idx: int | None = None,
) -> Tensor:
    """An embedding layer with a LoRA adapter (Hu et al. 2021, arXiv:2106.09685), as PEFT's.

    input_ids: int64 or int32 [...]; weight: [V, H], frozen; lora_A: [r, V]; lora_B: [H, r]; all
    float16, bfloat16, float32 or float64, not necessarily the same. scaling: a number or a 0-d
    tensor. scale multiplies the whole, as models such as Gemma do. padding_idx: the token whose
    column of lora_A gets no gradient.
    Returns [..., H] in weight's dtype; sums are taken in fp32 (float64 for float64), rounded once.

    Differentiable, once, in lora_A, lora_B and a tensor scaling. Raises TypeError or ValueError,
    naming the argument, for what does not fit, and for a weight that requires grad; IndexError,
    on the CPU, for a token outside the table.
    """
    _check_arguments(input_ids, weight, lora_A, lora_B)
    if isinstance(scaling, Tensor):
        lora_B, _ = fold_scaling(scaling, weight, lora_B, None)
        scaling = 1.0
    elif not isinstance(scaling, float | int):
        raise TypeError(f"scaling must be a number or a 0-d tensor, got {type(scaling).__name__}")
    padding = -1 if padding_idx is None else _checked_padding(padding_idx, len(weight))
    arguments = (input_ids, weight, lora_A, lora_B, float(scaling), float(scale), padding)
    if torch.compiler.is_compiling() or not (plain(weight) and plain(input_ids)):
        y: Tensor = _op(*arguments)[0]
        return y
    if torch.is_grad_enabled() and (lora_A.requires_grad or lora_B.requires_grad):
        y = _LoraEmbedding.apply(*arguments)
        return y
    return _forward(*arguments)[0]


def _check_arguments(input_ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in INTEGERS:
        kind = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"input_ids must be an int64 or int32 tensor, got {kind}")
    for name, tensor in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        _check.check_float(name, tensor)
        if tensor.dim() != 2:
            raise ValueError(f"{name} must be a matrix, got shape {list(tensor.shape)}")
        if tensor.device != input_ids.device:
            where = input_ids.device
            raise ValueError(f"{name} is on {tensor.device}, input_ids on {where}: move one")
    (v, h), r = weight.shape, lora_A.shape[0]
    if lora_A.shape[1] != v or r == 0:
        raise ValueError(f"lora_A must have shape [r, {v}] with r > 0, got {list(lora_A.shape)}")
    _check.check_shape("lora_B", lora_B, (h, r))
    if torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError("weight requires grad, but it is treated as frozen: detach it")


def _checked_padding(padding_idx: int, vocabulary: int) -> int:
    if not -vocabulary <= padding_idx < vocabulary:
        raise ValueError(f"padding_idx must be in [{-vocabulary}, {vocabulary}), got {padding_idx}")
    return padding_idx % vocabulary


# --- implementations ------------------------------------------------------------------------------


def _in_place(
    ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, scale: float
) -> tuple[Tensor, Tensor]:
    h = embedding(ids, lora_A.t()).float()
    right = lora_B.t().float() * (scaling * scale)
    y = embedding(ids, weight)
    if weight.dtype == torch.float32:
        return y.addmm_(h, right, beta=scale), h
    step = _BLOCK if y.device.type == "cpu" else max(1, len(y))
    for first in range(0, len(y), step):
        block = y[first : first + step]
        block.copy_(torch.addmm(block.float(), h[first : first + step], right, beta=scale))
    return y, h


def _backward_by(
    ds_db: Any,
    dy: Tensor,
    ids: Tensor,
    h: Tensor,
    lora_B: Tensor,
    vocabulary: int,
    factor: float,
    padding_idx: int,
    need_dA: bool,
    need_dB: bool,
) -> Grads:
    dh, dB = ds_db(dy, lora_B, h, factor)
    dA = _scatter(dh, ids, vocabulary, padding_idx) if need_dA else None
    return dA, dB if need_dB else None


def _scatter(dh: Tensor, ids: Tensor, vocabulary: int, padding_idx: int) -> Tensor:
    """dA [r, V]: each token's rows of dh [M, r], summed in their order."""
    if dh.device.type != "cpu":
        summed = torch.ops.aten.embedding_dense_backward(dh, ids, vocabulary, padding_idx, False)
        return summed.t().contiguous()
    dA = dh.new_zeros(dh.shape[1], vocabulary)
    present, place = torch.unique(ids, return_inverse=True)
    summed = torch.ops.aten.embedding_dense_backward(dh, place, len(present), -1, False)
    dA[:, present] = summed.t()
    if padding_idx >= 0:
        dA[:, padding_idx] = 0
    return dA


def _ds_db_by_cpu(dy: Tensor, lora_B: Tensor, h: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return _lora_linear_cpu.ds_db(dy, _cpu.fp32(lora_B), h, factor)


def _ds_db_by_triton(dy: Tensor, lora_B: Tensor, h: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    dB = torch.empty(lora_B.shape, dtype=torch.float32, device=dy.device)
    return ByTriton.ds_db(dy, _triton.adapter(lora_B), h, factor, dB), dB


OP = Op(
    "lora_embedding",
    Impl("triton", _in_place, _triton.supports, 20),
    Impl("cpu", _in_place, _cpu.supports("lora_ds_db"), 10),
    Impl("reference", reference.lora_embedding, lambda case: None, 0),
)
OP_BACKWARD = Op(
    "lora_embedding_backward",
    Impl("triton", partial(_backward_by, _ds_db_by_triton), _triton.supports, 20),
    Impl("cpu", partial(_backward_by, _ds_db_by_cpu), _cpu.supports("lora_ds_db"), 10),
    Impl("reference", reference.lora_embedding_backward, lambda case: None, 0),
)


def _forward(
    input_ids: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    scale: float,
    padding_idx: int,
) -> tuple[Tensor, Tensor]:
    """padding_idx concerns the gradient only."""
    run = OP.run(weight.device.type, weight.dtype, weight.dtype)
    y, h = run(input_ids.reshape(-1), weight, lora_A, lora_B, scaling, scale)
    return y.view(*input_ids.shape, weight.shape[1]), h


def _backward(dy: Tensor, input_ids: Tensor, h: Tensor, lora_B: Tensor, *arguments: Any) -> Grads:
    run = OP_BACKWARD.run(dy.device.type, dy.dtype, dy.dtype)
    rows = as_rows(dy, dy.shape[-1])
    grads: Grads = run(rows, input_ids.reshape(-1), h, lora_B, *arguments)
    return grads


# --- autograd, eager ------------------------------------------------------------------------------


class _LoraEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        output = _forward(*arguments)
        _setup_context(ctx, arguments, output)
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dy, _backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input_ids, weight, lora_A, lora_B, scaling, scale, padding_idx = inputs
    ctx.save_for_backward(input_ids, output[1], lora_B)
    ctx.plain = (len(weight), scaling * scale, padding_idx)
    ctx.dtype = lora_A.dtype


def _library_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    _setup_context(ctx, inputs, output)


def _gradients(ctx: Any, dy: Tensor, backward: Any) -> tuple[Tensor | None, ...]:
    input_ids, h, lora_B = ctx.saved_tensors
    need_dA, need_dB = ctx.needs_input_grad[2:4]
    if not (need_dA or need_dB):
        return (None,) * 7
    dA, dB = backward(dy, input_ids, h, lora_B, *ctx.plain, need_dA, need_dB)
    dA = dA.to(ctx.dtype) if need_dA else None
    dB = dB.to(lora_B.dtype) if need_dB else None
    return None, None, dA, dB, None, None, None


# --- torch.library: what torch.compile, export and fake tensors see -------------------------------


def _run_backward(dy: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    dA, dB = _backward(dy, *arguments)
    nothing = dy.new_empty(0)
    return nothing if dA is None else dA, nothing.clone() if dB is None else dB


def _fake(input_ids: Tensor, weight: Tensor, lora_A: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(weight.dtype)
    y = weight.new_empty(*input_ids.shape, weight.shape[1])
    return y, weight.new_empty(input_ids.numel(), lora_A.shape[0], dtype=acc)


def _fake_backward(
    dy: Tensor,
    input_ids: Tensor,
    h: Tensor,
    lora_B: Tensor,
    vocabulary: int,
    factor: float,
    padding_idx: int,
    need_dA: bool,
    need_dB: bool,
) -> tuple[Tensor, Tensor]:
    dA = h.new_empty(h.shape[1], vocabulary) if need_dA else dy.new_empty(0)
    return dA, h.new_empty(lora_B.shape) if need_dB else dy.new_empty(0)


def _library_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, dy, _op_backward)


_op = define(
    "lora_embedding(Tensor input_ids, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, "
    "float scale, int padding_idx) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _library_backward,
    _library_setup,
)
_op_backward = define(
    "lora_embedding_backward(Tensor dy, Tensor input_ids, Tensor h, Tensor lora_B, "
    "SymInt vocabulary, float factor, int padding_idx, bool need_dA, bool need_dB) "
    "-> (Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
