"""prompt_embed and its gradients by the CPU's kernels."""

from __future__ import annotations

import torch

from fusetune.ops import _cpu
from fusetune.ops._registry import Impl

Tensor = torch.Tensor


def _layout(
    dout: Tensor, slots: Tensor | None, rows: Tensor | None, groups: int, length: int
) -> tuple[int, int, int, int, int, int, int]:
    """The kernels' description of where prompts lie in the result, or in its gradient."""
    batch, places, _ = dout.shape
    return (
        batch,
        places - length,
        length,
        groups,
        0 if slots is None else slots.data_ptr(),
        0 if slots is None or len(slots) == 1 else length,
        0 if rows is None else rows.data_ptr(),
    )


def _forward(
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    slots: Tensor | None,
    rows: Tensor | None,
    scale: float,
) -> Tensor:
    (batch, tokens), (groups, length, h) = input_ids.shape, prompt.shape
    out = _cpu.empty(batch, length + tokens, h, dtype=weight.dtype)
    bad = _cpu.kernels().prompt_embed(
        input_ids.data_ptr(),
        _layout(out, slots, rows, groups, length),
        _cpu.matrix(weight),
        len(weight),
        h,
        _cpu.matrix(prompt.view(-1, h)),
        scale,
        _cpu.matrix(out.view(-1, h)),
    )
    if bad >= 0:
        raise not_a_token(input_ids, bad, len(weight))
    return out


def _dprompt(
    dout: Tensor, slots: Tensor | None, rows: Tensor | None, groups: int, length: int
) -> Tensor:
    h = dout.shape[2]
    dprompt = _cpu.empty(groups, length, h, dtype=torch.float32)
    layout = _layout(dout, slots, rows, groups, length)
    matrix = _cpu.matrix(dout.view(-1, h))
    _cpu.kernels().prompt_embed_dprompt(matrix, layout, h, dprompt.data_ptr())
    return dprompt


def _dweight(
    dout: Tensor,
    input_ids: Tensor,
    slots: Tensor | None,
    vocabulary: int,
    scale: float,
    padding_idx: int,
) -> Tensor:
    h, length = dout.shape[2], dout.shape[1] - input_ids.shape[1]
    dweight = _cpu.empty(vocabulary, h, dtype=dout.dtype)
    ids, order = input_ids.flatten().sort(stable=True)
    _cpu.kernels().prompt_embed_dweight(
        _cpu.matrix(dout.view(-1, h)),
        _layout(dout, slots, None, 1, length),
        h,
        ids.data_ptr(),
        order.data_ptr(),
        vocabulary,
        scale,
        padding_idx,
        _cpu.matrix(dweight),
    )
    return dweight


def not_a_token(input_ids: Tensor, at: int, vocabulary: int) -> ValueError:
    row, column = divmod(at, input_ids.shape[1])
    found = int(input_ids[row, column])
    return ValueError(f"input_ids[{row}, {column}] is {found}, not in [0, {vocabulary})")


CPU_FORWARD = Impl("cpu", _forward, _cpu.supports("prompt_embed"), 10)
CPU_DPROMPT = Impl("cpu", _dprompt, _cpu.supports("prompt_embed_dprompt"), 10)
CPU_DWEIGHT = Impl("cpu", _dweight, _cpu.supports("prompt_embed_dweight"), 10)
