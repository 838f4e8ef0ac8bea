"""A model's input of prompt and token embeddings in one pass, and the prompt's gradient.

Tiling: forward, a program writes ROWS places of the result, COLS columns of them; where the prompt
lies in slots, it counts those before each place. Backward, a program has COLS columns of one vector
of a prompt and goes over the batch in order: no atomics, always the same result.

Bytes, of o each: B (P + T) H read, of embeddings and prompt, and as many written; 8 B T of ids and
8 P of slots for each program. Backward B P H read, 4 G P H written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROWS, _COLS, _WARPS = 4, 512, 4
_SLOTS = 32  # that are compared at once


@triton.jit
def _prompt_embed(
    input_ids,
    weight,
    prompt,
    slots,
    rows,
    out,
    B,
    T,
    P,
    V,
    H,
    stride_w,
    stride_slots,
    scale,
    SLOTTED: tl.constexpr,
    ROWED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    b, i = place // (P + T), place % (P + T)
    valid = b < B
    if SLOTTED:
        before = tl.zeros((ROWS,), tl.int32)  # slots before a place
        taken = tl.zeros((ROWS,), tl.int32)
        for first in range(0, P, SLOTS):
            k = first + tl.arange(0, SLOTS)
            slot = tl.load(
                slots + b[:, None] * stride_slots + k[None, :],
                mask=valid[:, None] & (k < P)[None, :],
                other=P + T,
            )
            before += tl.sum((slot < i[:, None]).to(tl.int32), axis=1)
            taken += tl.sum((slot == i[:, None]).to(tl.int32), axis=1)
        prompted, vector, token = taken > 0, before, i - before
    else:
        prompted, vector, token = i < P, i, i - P
    group = tl.zeros((ROWS,), tl.int64)
    if ROWED:
        group = tl.load(rows + b, mask=valid, other=-1)
    has = valid & prompted & (group >= 0)
    inside = (col < H)[None, :]
    at = prompt + (group * P + vector)[:, None] * H + col[None, :]
    mine = tl.load(at, mask=has[:, None] & inside, other=0.0).to(tl.float32)
    spoken = valid & (prompted == 0)
    word = tl.load(input_ids + b * T + token, mask=spoken, other=0)
    known = (word >= 0) & (word < V)
    at = weight + word[:, None] * stride_w + col[None, :]
    embedding = tl.load(at, mask=(spoken & known)[:, None] & inside, other=0.0).to(tl.float32)
    embedding = tl.where(known[:, None], embedding * scale, float("nan"))
    result = tl.where(prompted[:, None], mine, embedding).to(out.dtype.element_ty)
    tl.store(out + place[:, None] * H + col[None, :], result, mask=valid[:, None] & inside)


@triton.jit
def _dprompt(
    dout,
    slots,
    rows,
    out,
    B,
    LENGTH,
    P,
    H,
    stride_slots,
    SLOTTED: tl.constexpr,
    ROWED: tl.constexpr,
    COLS: tl.constexpr,
):
    vector, group = tl.program_id(0).to(tl.int64), tl.program_id(2)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros((COLS,), tl.float32)
    for b in range(B):
        has, place = group == 0, vector
        if ROWED:
            has = tl.load(rows + b) == group
        if SLOTTED:
            place = tl.load(slots + b * stride_slots + vector)
        at = dout + (tl.cast(b, tl.int64) * LENGTH + place) * H + col
        total += tl.load(at, mask=(col < H) & has, other=0.0).to(tl.float32)
    tl.store(out + (group.to(tl.int64) * P + vector) * H + col, total, mask=col < H)


def _stride(slots: torch.Tensor | None) -> int:
    """Between the slots of two rows of the batch; 0 where all have the same."""
    return 0 if slots is None or len(slots) == 1 else slots.stride(0)


def launch_prompt_embed(
    input_ids: torch.Tensor,
    weight: torch.Tensor,
    prompt: torch.Tensor,
    slots: torch.Tensor | None,
    rows: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """[B, P + T, H] in weight's dtype, see reference/prompt_embed.py; NaN for an unknown token.

    input_ids: int64 [B, T]; weight: [V, H], rows contiguous, fp32, fp16 or bf16; prompt: [G, P, H],
    any of these; slots: int64 [B or 1, P], increasing; rows: int64 [B]. All but weight contiguous.
    """
    (batch, tokens), (vocabulary, h) = input_ids.shape, weight.shape
    length = prompt.shape[1]
    out = torch.empty(batch, length + tokens, h, dtype=weight.dtype, device=weight.device)
    if out.numel() == 0:
        return out
    grid = triton.cdiv(batch * (length + tokens), _ROWS), triton.cdiv(h, _COLS)
    _prompt_embed[grid](
        input_ids,
        weight,
        prompt,
        input_ids if slots is None else slots,
        input_ids if rows is None else rows,
        out,
        batch,
        tokens,
        length,
        vocabulary,
        h,
        weight.stride(0),
        _stride(slots),
        scale,
        SLOTTED=slots is not None,
        ROWED=rows is not None,
        ROWS=_ROWS,
        COLS=_COLS,
        SLOTS=_SLOTS,
        num_warps=_WARPS,
    )
    return out


def launch_dprompt(
    dout: torch.Tensor,
    slots: torch.Tensor | None,
    rows: torch.Tensor | None,
    groups: int,
    length: int,
) -> torch.Tensor:
    """The prompts' gradient, fp32 [groups, length, H], from dout [B, P + T, H], contiguous."""
    batch, places, h = dout.shape
    out = torch.empty(groups, length, h, dtype=torch.float32, device=dout.device)
    if out.numel() == 0:
        return out
    _dprompt[(length, triton.cdiv(h, _COLS), groups)](
        dout,
        dout if slots is None else slots,
        dout if rows is None else rows,
        out,
        batch,
        places,
        length,
        h,
        _stride(slots),
        SLOTTED=slots is not None,
        ROWED=rows is not None,
        COLS=_COLS,
        num_warps=_WARPS,
    )
    return out
