"""prompt_embed on a GPU: the implementations that its three ops have there.

    prompt_embed(input_ids [B, T], weight [V, H], prompt [G, P, H], slots?, rows?, scale)
        -> [B, P + T, H] in weight's dtype
    prompt_embed_dprompt(dout [B, P + T, H], slots?, rows?, groups, length) -> [G, P, H] in fp32
    prompt_embed_dweight(dout, input_ids, slots?, vocabulary, scale, padding_idx) -> [V, H]

slots: int64 [B or 1, P], strictly increasing; rows: int64 [B], -1 for none; input_ids: int64. All
are contiguous, but for the distance of weight's rows; prompt has a dtype of its own. What is not
listed here is torch's, as the reference has it.
"""

from __future__ import annotations

from fusetune.ops._registry import Impl

GPU_FORWARD: tuple[Impl, ...] = ()
GPU_DPROMPT: tuple[Impl, ...] = ()
GPU_DWEIGHT: tuple[Impl, ...] = ()
