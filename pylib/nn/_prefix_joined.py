"""The way that is always open: the prefix before keys and values, and before the mask's columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fusetune.nn._prefix_stack import PLACE, Call

Tensor = torch.Tensor


def joined(
    stock: Callable[..., Any],
    name: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    call: Call,
    segment: tuple[Tensor, Tensor],
    kwargs: dict[str, Any],
) -> Any:
    """`stock` on query [B, Hq, T, D] and [prefix | key], [prefix | value], [B, Hkv, P + S, D]."""
    tokens = query.shape[2]
    bias = kwargs.get("position_bias")
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is None and causal and tokens > 1 and "flash" not in name:
        # Nothing but causal; its form in the stock function has no room for a prefix.
        key, value = key[:, :, :tokens], value[:, :, :tokens]
        bias = None if bias is None else bias[..., :tokens]
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=query.device).tril()
    seen = _seen(call, query, kwargs.get("sliding_window"))
    keys = key.shape[2]
    if bias is not None:
        own = prefix_bias(call, module, tokens)
        length = call.prefix.length
        own = bias.new_zeros(*bias.shape[:-1], length) if own is None else own.to(bias.dtype)
        kwargs["position_bias"] = _side_by_side(own, bias)
    if mask is not None and mask.dim() == 2:  # flash: who is no padding
        ones = mask.new_ones(query.shape[0], call.prefix.length)
        mask = torch.cat([ones if seen is None else seen[:, 0, 0].to(mask.dtype), mask], 1)
    elif mask is not None or seen is not None:
        mask = _with_prefix(mask, seen, query, keys, call.prefix.length, name)
    key, value = (
        torch.cat([_for_rows(part, call, module, query.shape[0]), tokens_part], 2)
        for part, tokens_part in zip(segment, (key, value), strict=True)
    )
    return stock(module, query, key, value, mask, **kwargs)


def prefix_bias(call: Call, module: Any, tokens: int) -> Tensor | None:
    """T5's bias of the prefix's keys, [1 or B, H, T, P]: relative positions count the prefix."""
    if call.bias_owner is None or module.__dict__[PLACE][0] == "cross":
        return None
    owner = module if module.has_relative_attention_bias else call.bias_owner
    known = call.biases.get(id(owner))
    if known is not None:
        return known
    lengths = call.prefix.lengths or (call.prefix.length,)
    by_prefix = [
        owner.compute_bias(
            tokens,
            call.prefix.length,
            device=owner.relative_attention_bias.weight.device,
            past_seen_tokens=length + call.position,
        )
        for length in lengths
    ]
    bias: Tensor = torch.cat(by_prefix)
    if call.rows is not None and len(lengths) > 1:
        bias = bias[call.rows.clamp(min=0)]
    call.biases[id(owner)] = bias
    return bias


def _for_rows(part: Tensor, call: Call, module: Any, batch: int) -> Tensor:
    """A prefix's keys or values [P, Hkv, D] or [G, P, Hkv, D] as [B, Hkv, P, D]."""
    if call.rows is not None and part.dim() == 4:
        part = part[call.rows.clamp(min=0)].transpose(1, 2)
    else:
        part = part if part.dim() == 3 else part[0]
        part = part.transpose(0, 1).expand(batch, *(part.shape[i] for i in (1, 0, 2)))
    return torch.nn.functional.dropout(part, call.prefix.dropout_p, module.training)


def _seen(call: Call, query: Tensor, window: int | None) -> Tensor | None:
    """Which of the prefix's keys queries see, boolean [B or 1, 1, T or 1, P]; None for all."""
    length, tokens = call.prefix.length, query.shape[2]
    windowed = window is not None and length + call.position + tokens > window
    if call.rows is None and call.lengths is None and not windowed:
        return None
    j = torch.arange(length, device=query.device)
    own: Tensor = torch.full((1,), length, device=query.device)
    if call.lengths is not None:
        own = call.lengths[:1] if call.rows is None else call.lengths[call.rows.clamp(min=0)]
    if call.rows is not None:
        own = torch.where(call.rows >= 0, own, 0)
    own = own[:, None, None, None]
    seen = j < own
    if window is not None and windowed:
        i = torch.arange(tokens, device=query.device)[:, None]
        seen = seen & (own + call.position + i - j < window)
    return seen


def _with_prefix(
    mask: Tensor | None, seen: Tensor | None, query: Tensor, keys: int, length: int, name: str
) -> Tensor:
    """A mask of four dimensions with the prefix's columns first, boolean or additive as it is."""
    if mask is None:
        boolean = name != "eager"
        shape = (1, 1, query.shape[2], keys)
        mask = torch.ones(shape, dtype=torch.bool, device=query.device)
        mask = mask if boolean else torch.zeros(shape, dtype=query.dtype, device=query.device)
    mask = mask[..., :keys]
    if seen is None:
        seen = mask.new_ones((1, 1, 1, length), dtype=torch.bool)
    if mask.dtype != torch.bool:
        hidden = torch.finfo(mask.dtype).min
        seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill(~seen, hidden)
    return _side_by_side(seen, mask)


def _side_by_side(left: Tensor, right: Tensor) -> Tensor:
    leading = torch.broadcast_shapes(left.shape[:-1], right.shape[:-1])
    parts = [part.expand(*leading, part.shape[-1]) for part in (left, right)]
    return torch.cat(parts, -1)
