"""Attention on the CPU that gives its log-sum-exp: by ops.attention's kernel, or torch's flash one.

Ours is faster up to MOST_KEYS keys; torch's goes over keys in blocks. But it computes all T x S
scores of causal attention, where a block of queries needs no keys after its last one: called for
blocks of 64 it leaves out nearly half, 1.4 times as fast at T = S = 512.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from fusetune.ops._registry import backend
from fusetune.ops.attention import OP, OP_BACKWARD
from fusetune.reference.attention import Options

Tensor = torch.Tensor
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
BLOCK = 64
MOST_KEYS = 2048
FEW_KEYS = 512


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """As _base_attention.attend, with a bias that is added, and 0 in wholly masked rows of lse."""
    if ours(query, key):
        return OP.run("cpu", query.dtype, None)(query, key, value, Options(bias, causal, scale))
    tokens = query.shape[2]
    if not causal or tokens <= BLOCK:
        out, lse = _forward(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)
        return out, lse
    outs, lses = [], []
    for begin, end, keys, mask in _blocks(query, key):
        rows = query[:, :, begin:end], key[:, :, :keys], value[:, :, :keys]
        out, lse = _forward(*rows, 0.0, False, attn_mask=mask, scale=scale)
        outs.append(out.transpose(1, 2))
        lses.append(lse.transpose(1, 2))
    return torch.cat(outs, 1).transpose(1, 2), torch.cat(lses, 1).transpose(1, 2)


def attend_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As _base_attention.attend_backward."""
    if ours(query, key):
        options = Options(bias, causal, scale)
        run = OP_BACKWARD.run("cpu", query.dtype, None)
        return run(dout, query, key, value, out, lse, options)
    if not causal or query.shape[2] <= BLOCK:
        rows = dout, query, key, value, out, lse
        dquery, dkey, dvalue = _backward(*rows, 0.0, causal, attn_mask=bias, scale=scale)
        return dquery, dkey, dvalue
    acc = lse.dtype  # a key's gradient is a sum over the blocks
    dkey, dvalue = key.new_zeros(key.shape, dtype=acc), key.new_zeros(key.shape, dtype=acc)
    dqueries = []
    for begin, end, keys, mask in _blocks(query, key):
        rows = (
            *(dout[:, :, begin:end], query[:, :, begin:end], key[:, :, :keys], value[:, :, :keys]),
            *(out[:, :, begin:end], lse[:, :, begin:end]),
        )
        block = _backward(*rows, 0.0, False, attn_mask=mask, scale=scale)
        dqueries.append(block[0].transpose(1, 2))
        dkey[:, :, :keys] += block[1]
        dvalue[:, :, :keys] += block[2]
    dquery = torch.cat(dqueries, 1).transpose(1, 2)
    return dquery, dkey.to(key.dtype), dvalue.to(value.dtype)


def ours(query: Tensor, key: Tensor) -> bool:
    """Whether ops.attention's kernel takes them.

    With AMX also bfloat16 and few keys: torch's backward pass takes 1.1 to 6 times as long there.
    """
    few = query.dtype == torch.bfloat16 and key.shape[2] <= FEW_KEYS
    faster = is_faster_for(query.shape[2], key.shape[2]) and (few or is_faster_in(query.dtype))
    host = backend() in ("auto", "cpu")
    return faster and host and OP.carrier("cpu", query.dtype, None) == "cpu"


def is_faster_in(dtype: torch.dtype) -> bool:
    """Whether ops.attention's kernel beats torch's, without dropout.

    In 16 bits torch takes 3.8 to 30 times as long, even with AVX512-BF16. With AMX its bfloat16 is
    1.4 to 3 times as fast as ours forward, and its float16 takes 1.1 to 2 times as long.
    """
    return dtype in (torch.float32, torch.float16) or (dtype == torch.bfloat16 and not _amx())


def is_faster_for(tokens: int, keys: int) -> bool:
    """The same of a call's shape. A single query is a matter of bandwidth."""
    return tokens > 1 and keys <= MOST_KEYS


@functools.cache
def _amx() -> bool:
    known = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(known and known())


def _blocks(query: Tensor, key: Tensor) -> Iterator[tuple[int, int, int, Tensor]]:
    """(first query, end, number of keys, mask [end - first, keys]) of each block."""
    for begin in range(0, query.shape[2], BLOCK):
        end = min(begin + BLOCK, query.shape[2])
        keys = min(end, key.shape[2])
        mask = torch.full((end - begin, keys), -torch.inf, dtype=query.dtype, device=query.device)
        yield begin, end, keys, mask.triu_(begin + 1)
