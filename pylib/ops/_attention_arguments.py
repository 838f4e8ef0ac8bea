"""What attention, with a prefix or without, checks of its arguments."""

from __future__ import annotations

import torch

from fusetune.ops import _check

Tensor = torch.Tensor


def check_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device}, query on {query.device}: move one")


def check_tokens(query: Tensor, key: Tensor, value: Tensor) -> None:
    """query [B, Hq, T, D], key and value [B, Hkv, S, D], Hq a multiple of Hkv."""
    _check.check_float("query", query)
    if query.dim() != 4 or query.shape[-1] == 0:
        raise ValueError(f"query must have shape [B, Hq, T, D] with D > 0, got {list(query.shape)}")
    batch, heads, _, dim = query.shape
    for name, tensor in (("key", key), ("value", value)):
        _check.check_float(name, tensor)
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must be {query.dtype} as query is, got {tensor.dtype}")
        check_device(name, tensor, query)
    if key.dim() != 4 or key.shape[0] != batch or key.shape[3] != dim:
        raise ValueError(f"key must have shape [{batch}, Hkv, S, {dim}], got {list(key.shape)}")
    if not key.shape[1] or heads % key.shape[1]:
        raise ValueError(
            f"query's heads must be a multiple of key's, got {heads} and {key.shape[1]}"
        )
    _check.check_shape("value", value, tuple(key.shape))


def check_mask(query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
    """Boolean or additive, and broadcast to [B, Hq, T, S]; None beside is_causal."""
    if attn_mask is None:
        return
    if is_causal:
        raise ValueError("attn_mask and is_causal cannot both be given")
    if not isinstance(attn_mask, Tensor) or attn_mask.dtype != torch.bool:
        _check.check_float("attn_mask", attn_mask)
    check_device("attn_mask", attn_mask, query)
    check_no_gradient("attn_mask", attn_mask)
    check_broadcast("attn_mask", attn_mask, (*query.shape[:3], key.shape[2]))


def check_no_gradient(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must not require a gradient, which is not computed: detach it, or join keys, "
            "values and bias for scaled_dot_product_attention"
        )


def check_broadcast(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    given = tuple(tensor.shape)
    matched = zip(reversed(given), reversed(shape), strict=False)
    if len(given) > 4 or any(size not in (1, wanted) for size, wanted in matched):
        raise ValueError(f"{name} must broadcast to {list(shape)}, got {list(given)}")
