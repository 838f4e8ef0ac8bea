"""prefix_attend on the native CPU kernels. The result is written over base_out."""

from __future__ import annotations

from typing import Any

import torch

from fusetune.ops import _cpu
from fusetune.ops._registry import Impl
from fusetune.reference.prefix_attention import Options

Tensor = torch.Tensor


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _expanded(bias: Tensor | None, batch: int, heads: int) -> Tensor | None:
    """The bias [B, Hq, T, P] in fp32 and with contiguous rows, expanded over what it lacks."""
    if bias is None:
        return None
    bias = bias.detach().resolve_neg().float()
    bias = bias if bias.stride(-1) == 1 else bias.contiguous()
    return bias.expand(batch, heads, -1, -1)


def _native(options: Options, query: Tensor) -> Options:
    """The options as `_prefix` describes them."""
    return options._replace(
        bias=_expanded(options.bias, query.shape[0], query.shape[1]),
        rows=_contiguous(options.rows),
        lengths=_contiguous(options.lengths),
    )


def _prefix(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    options: Options,
) -> tuple[Any, ...]:
    """The kernels' description of a prefix and of the queries. The tensors must outlive it."""
    batch, heads, tokens, dim = query.shape
    groups, count, kv_heads, _ = prefix_key.shape
    return (
        (batch, heads, kv_heads, tokens, dim, groups, count),
        _cpu.heads(query),
        _cpu.heads(prefix_key.transpose(1, 2)),
        _cpu.heads(prefix_value.transpose(1, 2)),
        _cpu.distances(options.bias),
        _cpu.address(options.rows),
        _cpu.address(options.lengths),
        options.scale,
        options.window,
        options.position,
        _cpu.dropout(options.dropout_p, options.seed),
    )


def _forward(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    base_out: Tensor,
    base_lse: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    options = _native(options, query)
    lse = _cpu.empty(*query.shape[:3], dtype=torch.float32)
    prefix = _prefix(query, prefix_key, prefix_value, options)
    _cpu.kernels().prefix_attend(
        prefix, _cpu.heads(base_out), _cpu.distances(base_lse), lse.data_ptr()
    )
    return base_out, lse


def _backward(
    dout: Tensor,
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    dquery: Tensor | None,
    need_dquery: bool,
    need_dprefix: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    options = _native(options, query)
    add = dquery is not None
    if not need_dquery:
        dquery = None
    elif dquery is None:
        batch, heads, tokens, dim = query.shape
        dquery = _cpu.empty(batch, tokens, heads, dim, dtype=query.dtype).transpose(1, 2)
    shape = prefix_key.shape
    dkey = _cpu.empty(*shape, dtype=torch.float32) if need_dprefix else None
    dvalue = _cpu.empty(*shape, dtype=torch.float32) if need_dprefix else None
    prefix = _prefix(query, prefix_key, prefix_value, options)
    _cpu.kernels().prefix_attend_backward(
        *(prefix, _cpu.heads(dout), _cpu.heads(out), lse.data_ptr()),
        *(_cpu.heads(dquery), add, _cpu.address(dkey), _cpu.address(dvalue)),
    )
    if dkey is not None and dvalue is not None:
        dkey, dvalue = dkey.to(prefix_key.dtype), dvalue.to(prefix_value.dtype)
    return dquery, dkey, dvalue


CPU_FORWARD = Impl("cpu", _forward, _cpu.supports("prefix_attend"), 10)
CPU_BACKWARD = Impl("cpu", _backward, _cpu.supports("prefix_attend_backward"), 10)
