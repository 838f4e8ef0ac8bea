"""prefix_attention: attention to a prefix of keys and values and to those of the tokens.

The prefix is read where it lies, once for all rows of the batch: nothing is concatenated, no mask
is widened. torch's own attention does the tokens, and the prefix is merged into its result; on the
CPU ours does both in one pass.
"""

from __future__ import annotations

import math

import torch

from fusetune.ops import _check
from fusetune.ops._attention_arguments import (
    check_broadcast,
    check_device,
    check_mask,
    check_no_gradient,
    check_tokens,
)
from fusetune.ops._prefix_attention import Given, attention
from fusetune.reference.dropout import new_seed

Tensor = torch.Tensor


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    prefix_bias: Tensor | None = None,
    window: int | None = None,
    position: int = 0,
    rows: Tensor | None = None,
    lengths: Tensor | None = None,
    prefix_dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """softmax(scale query [prefix_key | key]^T) [prefix_value | value] (Li and Liang 2021).

    query: [B, Hq, T, D]; key, value: [B, Hkv, S, D], Hq a multiple of Hkv; all float16, bfloat16,
    float32 or float64. prefix_key, prefix_value: [P, Hkv, D], or [G, P, Hkv, D] for several
    prefixes, in query's dtype, or float32 beside 16 bits. Returns [B, Hq, T, D].

    attn_mask (boolean or additive, broadcast to [B, Hq, T, S]) and is_causal (from the top left)
    mean what they mean to scaled_dot_product_attention, and concern key alone: every query sees
    the prefix. scale: 1 / sqrt(D) unless given.
    prefix_bias: [1 or B, 1 or Hq, T, P], added to the scores of the prefix; carries no gradient.
    window, position: a sliding window. Query i sees prefix key j where P + position + i - j <
    window; position is the number of tokens before query 0, those of a cache.
    rows: int64 [B], which prefix each row of the batch has, -1 for none; needed with several.
    lengths: int64 [G], how many of its P keys a prefix has; the others are padding.
    prefix_dropout_p: with `training`, elements of the prefix are dropped out, for each row of the
    batch by itself, with a seed from torch's generator.

    A row that sees neither a key nor the prefix is zeros. Differentiable, once, in query, key,
    value and the prefix. Raises TypeError or ValueError, naming the argument, for shapes, dtypes,
    devices or values that do not fit. Definition: reference/prefix_attention.py.
    """
    check_tokens(query, key, value)
    if isinstance(prefix_key, Tensor) and prefix_key.dim() == 3:
        prefix_key = prefix_key.unsqueeze(0)
    if isinstance(prefix_value, Tensor) and prefix_value.dim() == 3:
        prefix_value = prefix_value.unsqueeze(0)
    _check_prefix(query, key, prefix_key, prefix_value)
    _check_masks(query, key, prefix_key, attn_mask, is_causal, prefix_bias)
    _check_choice(query, prefix_key, rows, lengths)
    _check_numbers(window, position, prefix_dropout_p)
    dropped = training and prefix_dropout_p > 0
    given = Given(
        mask=attn_mask,
        bias=prefix_bias,
        rows=rows,
        lengths=lengths,
        seed=new_seed(query.device) if dropped else None,
        causal=is_causal,
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else float(scale),
        window=window or 0,
        position=position,
        dropout_p=float(prefix_dropout_p) if dropped else 0.0,
    )
    return attention(query, key, value, prefix_key, prefix_value, given)


# --- arguments ---- -------------------------------------------------------------------------------


def _check_prefix(query: Tensor, key: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> None:
    for name, tensor in (("prefix_key", prefix_key), ("prefix_value", prefix_value)):
        _check.check_float(name, tensor)
        if tensor.dtype != query.dtype and (
            tensor.dtype != torch.float32 or query.dtype == torch.float64
        ):
            wider = "" if query.dtype == torch.float64 else " or float32"
            raise TypeError(f"{name} must be {query.dtype} as query is{wider}, got {tensor.dtype}")
        check_device(name, tensor, query)
    heads, dim = key.shape[1], key.shape[3]
    shape = tuple(prefix_key.shape)
    if len(shape) != 4 or shape[2:] != (heads, dim) or not shape[0]:
        got = shape[1:] if shape[:1] == (1,) else shape
        raise ValueError(
            f"prefix_key must have shape [P, {heads}, {dim}] or [G, P, {heads}, {dim}], got "
            f"{list(got)}"
        )
    _check.check_shape("prefix_value", prefix_value, shape)
    if prefix_value.dtype != prefix_key.dtype:
        raise TypeError(
            f"prefix_value must be {prefix_key.dtype} as prefix_key is, got {prefix_value.dtype}"
        )


def _check_masks(
    query: Tensor,
    key: Tensor,
    prefix_key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    prefix_bias: Tensor | None,
) -> None:
    check_mask(query, key, attn_mask, is_causal)
    if prefix_bias is not None:
        _check.check_float("prefix_bias", prefix_bias)
        check_device("prefix_bias", prefix_bias, query)
        check_no_gradient("prefix_bias", prefix_bias)
        check_broadcast("prefix_bias", prefix_bias, (*query.shape[:3], prefix_key.shape[1]))
        if prefix_bias.dim() != 4 or prefix_bias.shape[2:] != (query.shape[2], prefix_key.shape[1]):
            shape = [query.shape[2], prefix_key.shape[1]]
            raise ValueError(
                f"prefix_bias must have shape [1 or B, 1 or Hq, {shape[0]}, {shape[1]}], got "
                f"{list(prefix_bias.shape)}"
            )


def _check_choice(
    query: Tensor, prefix_key: Tensor, rows: Tensor | None, lengths: Tensor | None
) -> None:
    groups, count = prefix_key.shape[:2]
    if rows is None and groups > 1:
        raise ValueError(f"rows must say which of the {groups} prefixes each batch row has")
    for name, tensor, size in (("rows", rows, query.shape[0]), ("lengths", lengths, groups)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {tensor.dtype}")
        _check.check_shape(name, tensor, (size,))
        check_device(name, tensor, query)
    _check_range("rows", rows, -1, groups - 1)
    _check_range("lengths", lengths, 0, count)


def _check_range(name: str, tensor: Tensor | None, least: int, most: int) -> None:
    """Values are looked at where that costs no wait for another device, and no graph break."""
    if tensor is None or tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return
    values = tensor.tolist()
    for value in values:
        if not least <= value <= most:
            raise ValueError(f"{name} must hold values from {least} to {most}, got {value}")


def _check_numbers(window: int | None, position: int, prefix_dropout_p: float) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window must be positive, got {window}")
    if position < 0:
        raise ValueError(f"position must not be negative, got {position}")
    if not 0 <= prefix_dropout_p <= 1:
        raise ValueError(f"prefix_dropout_p must be between 0 and 1, got {prefix_dropout_p}")
