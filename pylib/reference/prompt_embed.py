"""Prompt tuning's input (Lester et al. 2021, arXiv:2104.08691), in plain PyTorch.

A prompt of P vectors and the embeddings of T tokens make a sequence of P + T: the prompt in front,
or, as in P-tuning (Liu et al. 2021, arXiv:2103.10385), in slots among the tokens.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from fusetune.reference.linear_4bit import accumulate_dtype

Tensor = torch.Tensor


def prompt_embed(
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    slots: Tensor | None,
    rows: Tensor | None,
    scale: float,
) -> Tensor:
    """input_ids [B, T], weight [V, H], prompt [G, P, H] -> [B, P + T, H] in weight's dtype.

    slots: int64 [B or 1, P], strictly increasing: where the prompt lies; None: in front. rows:
    int64 [B], which of the G prompts a row has, -1 none: its slots are zeros; None: the first. The
    tokens' embeddings are multiplied by `scale`.
    """
    tokens = functional.embedding(input_ids, weight)
    tokens = (tokens.to(accumulate_dtype(weight.dtype)) * scale).to(weight.dtype)
    first = prompt[:1].expand(len(input_ids), -1, -1) if rows is None else prompt[rows.clamp(0)]
    if rows is not None:
        first = first.where((rows >= 0)[:, None, None], 0)
    joined = torch.cat((first.to(weight.dtype), tokens), 1)
    if slots is None:
        return joined
    return joined.gather(1, _spread(_order(slots, *joined.shape[:2]), joined))


def prompt_embed_dprompt(
    dout: Tensor, slots: Tensor | None, rows: Tensor | None, groups: int, length: int
) -> Tensor:
    """dout [B, P + T, H] -> the prompts' gradient [groups, length = P, H], summed over the batch.

    In fp32, float64 for float64.
    """
    mine = _slots_of(dout, slots, length).to(accumulate_dtype(dout.dtype))
    if rows is None:
        total = mine.sum(0, keepdim=True)
        return functional.pad(total, (0, 0, 0, 0, 0, groups - 1)).contiguous()
    has = rows == torch.arange(groups, device=rows.device)[:, None]  # [G, B]
    return torch.einsum("gb,bph->gph", has.to(mine.dtype), mine).contiguous()


def prompt_embed_dweight(
    dout: Tensor,
    input_ids: Tensor,
    slots: Tensor | None,
    vocabulary: int,
    scale: float,
    padding_idx: int,
) -> Tensor:
    """dout [B, P + T, H] -> the gradient [V, H] of the embeddings' weight, in dout's dtype.

    That of row `padding_idx` is zero (-1: there is no such row).
    """
    upper = _tokens_of(dout, slots, dout.shape[1] - input_ids.shape[1])
    upper = upper.to(accumulate_dtype(dout.dtype)) * scale
    backward = torch.ops.aten.embedding_dense_backward
    dweight: Tensor = backward(upper.contiguous(), input_ids, vocabulary, padding_idx, False)
    return dweight.to(dout.dtype)


def _order(slots: Tensor, batch: int, length: int) -> Tensor:
    """Where in [prompt | tokens] each place of the result comes from: [B, P + T]."""
    taken = slots.new_zeros(batch, length).scatter_(1, slots.expand(batch, -1), 1)
    before = taken.cumsum(1) - taken  # vectors of the prompt that lie before a place
    places = torch.arange(length, device=slots.device)
    return torch.where(taken.bool(), before, slots.shape[1] + places - before)


def _slots_of(dout: Tensor, slots: Tensor | None, length: int) -> Tensor:
    """The prompt's part [B, P, H] of dout."""
    if slots is None:
        return dout[:, :length]
    return dout.gather(1, _spread(slots.expand(len(dout), -1), dout))


def _tokens_of(dout: Tensor, slots: Tensor | None, length: int) -> Tensor:
    """The tokens' part [B, T, H] of dout."""
    if slots is None:
        return dout[:, length:]
    places = _order(slots, *dout.shape[:2]).argsort(1)[:, length:]
    return dout.gather(1, _spread(places, dout))


def _spread(index: Tensor, like: Tensor) -> Tensor:
    """index [B, N] for a gather of whole vectors: [B, N, H]."""
    return index.unsqueeze(-1).expand(-1, -1, like.shape[-1])
