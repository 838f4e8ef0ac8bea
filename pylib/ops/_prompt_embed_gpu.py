"""prompt_embed on a GPU, by Triton: the implementations that its three ops have there.

    prompt_embed(input_ids [B, T], weight [V, H], prompt [G, P, H], slots?, rows?, scale)
        -> [B, P + T, H] in weight's dtype
    prompt_embed_dprompt(dout [B, P + T, H], slots?, rows?, groups, length) -> [G, P, H] in fp32
    prompt_embed_dweight(dout, input_ids, slots?, vocabulary, scale, padding_idx) -> [V, H]

slots: int64 [B or 1, P], strictly increasing; rows: int64 [B], -1 for none; input_ids: int64. All
are contiguous, but for the distance of weight's rows; prompt has a dtype of its own. What is not
listed here is torch's, as the reference has it.
"""

from __future__ import annotations

import torch

from fusetune.ops import _triton
from fusetune.ops._registry import Impl

Tensor = torch.Tensor


def _forward(
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    slots: Tensor | None,
    rows: Tensor | None,
    scale: float,
) -> Tensor:
    from fusetune._triton.prompt_embed import launch_prompt_embed

    with _triton.on(weight.device):
        return launch_prompt_embed(input_ids, weight, prompt, slots, rows, scale)


def _dprompt(
    dout: Tensor, slots: Tensor | None, rows: Tensor | None, groups: int, length: int
) -> Tensor:
    from fusetune._triton.prompt_embed import launch_dprompt

    with _triton.on(dout.device):
        return launch_dprompt(dout, slots, rows, groups, length)


GPU_FORWARD = (Impl("triton", _forward, _triton.supports_mixed, 20),)
GPU_DPROMPT = (Impl("triton", _dprompt, _triton.supports_mixed, 20),)
GPU_DWEIGHT: tuple[Impl, ...] = ()
