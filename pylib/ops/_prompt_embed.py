"""The core of prompt_embed: three ops, of the result and of the gradients of prompt and weight.

Nothing is kept for the backward pass but the tokens' ids, the slots and the rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fusetune.ops._prompt_embed_cpu import CPU_DPROMPT, CPU_DWEIGHT, CPU_FORWARD, not_a_token
from fusetune.ops._prompt_embed_gpu import GPU_DPROMPT, GPU_DWEIGHT, GPU_FORWARD
from fusetune.ops._registry import Impl, Op, define, plain
from fusetune.ops._weight import as_rows
from fusetune.reference import prompt_embed as reference
from fusetune.reference.linear_4bit import accumulate_dtype

Tensor = torch.Tensor


def embed(
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    slots: Tensor | None,
    rows: Tensor | None,
    scale: float,
    padding_idx: int,
) -> Tensor:
    """input_ids [B, T], weight [V, H], prompt [G, P, H], slots [B or 1, P], rows [B].

    padding_idx: -1 for none. Differentiable, once, in prompt and weight. Shapes and dtypes are
    trusted; on the CPU values of input_ids and rows are checked.
    """
    arguments = input_ids, weight, prompt, slots, rows, scale
    if torch.compiler.is_compiling() or not all(map(plain, (input_ids, weight, prompt))):
        return _op(*arguments, padding_idx)
    if torch.is_grad_enabled() and (weight.requires_grad or prompt.requires_grad):
        out: Tensor = _PromptEmbed.apply(*arguments, padding_idx)
        return out
    return _forward(*arguments, padding_idx)


# --- implementations ---- -------------------------------------------------------------------------


def _reference_forward(
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    slots: Tensor | None,
    rows: Tensor | None,
    scale: float,
) -> Tensor:
    if input_ids.device.type == "cpu":
        bad = ((input_ids < 0) | (input_ids >= len(weight))).flatten().nonzero()
        if len(bad):
            raise not_a_token(input_ids, int(bad[0]), len(weight))
    return reference.prompt_embed(input_ids, weight, prompt, slots, rows, scale)


OP = Op(
    "prompt_embed",
    *GPU_FORWARD,
    CPU_FORWARD,
    Impl("reference", _reference_forward, lambda case: None, 0),
)
OP_DPROMPT = Op(
    "prompt_embed_dprompt",
    *GPU_DPROMPT,
    CPU_DPROMPT,
    Impl("reference", reference.prompt_embed_dprompt, lambda case: None, 0),
)
OP_DWEIGHT = Op(
    "prompt_embed_dweight",
    *GPU_DWEIGHT,
    CPU_DWEIGHT,
    Impl("reference", reference.prompt_embed_dweight, lambda case: None, 0),
)


def _packed(tensor: Tensor) -> Tensor:
    return tensor.resolve_neg().contiguous()


def _forward(
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    slots: Tensor | None,
    rows: Tensor | None,
    scale: float,
    padding_idx: int,
) -> Tensor:
    """padding_idx concerns the gradient only."""
    if rows is not None and rows.device.type == "cpu" and len(rows):
        low, high = (int(bound) for bound in rows.aminmax())
        if low < -1 or high >= len(prompt):
            raise ValueError(f"rows must be in [-1, {len(prompt)}), got values in [{low}, {high}]")
    slots = None if slots is None else slots.contiguous()
    rows = None if rows is None else rows.contiguous()
    run = OP.run(weight.device.type, weight.dtype, prompt.dtype)
    table = as_rows(weight, weight.shape[1])
    out: Tensor = run(input_ids.contiguous(), table, _packed(prompt), slots, rows, scale)
    return out


def _dprompt(
    dout: Tensor, slots: Tensor | None, rows: Tensor | None, groups: int, length: int
) -> Tensor:
    slots = None if slots is None else slots.contiguous()
    rows = None if rows is None else rows.contiguous()
    run = OP_DPROMPT.run(dout.device.type, dout.dtype, None)
    dprompt: Tensor = run(_packed(dout), slots, rows, groups, length)
    return dprompt


def _dweight(
    dout: Tensor,
    input_ids: Tensor,
    slots: Tensor | None,
    vocabulary: int,
    scale: float,
    padding_idx: int,
) -> Tensor:
    slots = None if slots is None else slots.contiguous()
    run = OP_DWEIGHT.run(dout.device.type, dout.dtype, None)
    ids = input_ids.contiguous()
    dweight: Tensor = run(_packed(dout), ids, slots, vocabulary, scale, padding_idx)
    return dweight


# --- autograd, eager ---- -------------------------------------------------------------------------


class _PromptEmbed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        _setup_context(ctx, arguments, None)
        return _forward(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dout, _dprompt, _dweight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    input_ids, weight, prompt, slots, rows, scale, padding_idx = inputs
    ctx.save_for_backward(input_ids, slots, rows)
    ctx.prompt = (*prompt.shape[:2], prompt.dtype)
    ctx.weight = (weight.shape[0], scale, padding_idx)


def _gradients(ctx: Any, dout: Tensor, dprompt_op: Any, dweight_op: Any) -> tuple[Any, ...]:
    input_ids, slots, rows = ctx.saved_tensors
    groups, length, dtype = ctx.prompt
    dprompt = dweight = None
    if ctx.needs_input_grad[1]:
        dweight = dweight_op(dout, input_ids, slots, *ctx.weight)
    if ctx.needs_input_grad[2]:
        dprompt = dprompt_op(dout, slots, rows, groups, length).to(dtype)
    return None, dweight, dprompt, None, None, None, None


# --- torch.library: what torch.compile, export and fake tensors see -------------------------------


def _fake(
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    slots: Tensor | None,
    rows: Tensor | None,
    scale: float,
    padding_idx: int,
) -> Tensor:
    batch, tokens = input_ids.shape
    return weight.new_empty(batch, prompt.shape[1] + tokens, weight.shape[1])


def _fake_dprompt(
    dout: Tensor, slots: Tensor | None, rows: Tensor | None, groups: int, length: int
) -> Tensor:
    return dout.new_empty(groups, length, dout.shape[2], dtype=accumulate_dtype(dout.dtype))


def _fake_dweight(
    dout: Tensor,
    input_ids: Tensor,
    slots: Tensor | None,
    vocabulary: int,
    scale: float,
    padding_idx: int,
) -> Tensor:
    return dout.new_empty(vocabulary, dout.shape[2])


def _library_backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, dout, _op_dprompt, _op_dweight)


_op = define(
    "prompt_embed(Tensor input_ids, Tensor weight, Tensor prompt, Tensor? slots, Tensor? rows, "
    "float scale, int padding_idx) -> Tensor",
    _forward,
    _fake,
    _library_backward,
    _setup_context,
)
_op_dprompt = define(
    "prompt_embed_dprompt(Tensor dout, Tensor? slots, Tensor? rows, SymInt groups, "
    "SymInt length) -> Tensor",
    _dprompt,
    _fake_dprompt,
)
_op_dweight = define(
    "prompt_embed_dweight(Tensor dout, Tensor input_ids, Tensor? slots, SymInt vocabulary, "
    "float scale, int padding_idx) -> Tensor",
    _dweight,
    _fake_dweight,
)
