"""Attention to a prefix of keys and values, merged into attention to other keys, in plain PyTorch.

Prefix tuning (Li and Liang 2021, arXiv:2101.00190) and P-tuning v2 (Liu et al. 2022,
arXiv:2110.07602) put P trained keys and values before those of the tokens:

    out = softmax(scale query [prefix_key | key]^T) [prefix_value | value]

Softmax over two segments needs no concatenation. Attention to the tokens alone gives base_out and
the logarithm base_lse of its denominator; with s = scale query prefix_key^T (+ bias),

    lse = log(e^base_lse + sum_j e^s_j)
    out = e^(base_lse - lse) base_out + sum_j e^(s_j - lse) prefix_value_j

Backward, both segments see the same out and lse: with delta = dout . out,

    p_j = e^(s_j - lse)    ds_j = p_j (dout . prefix_value_j - delta)    dprefix_value_j = p_j dout
    dquery = scale sum_j ds_j prefix_key_j                         dprefix_key_j = scale ds_j query

A log-sum-exp of +inf stands for a row that attends to nothing: e^(s - lse) is 0 for every score.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusetune.reference.dropout import dropout
from fusetune.reference.linear_4bit import accumulate_dtype

Tensor = torch.Tensor


class Options(NamedTuple):
    """How queries [B, Hq, T, D] attend to prefixes [G, P, Hkv, D].

    bias: [1 or B, 1 or Hq, T, P], added to scores; rows: int64 [B], which prefix a batch row has,
    -1 none (None: all have the first); lengths: int64 [G], how many of the P keys a prefix has.
    window > 0: prefix key j of n is seen by query i where n + position + i - j < window. seed: the
    elements of keys and values are dropped out, for each batch row by itself, with the mask of a
    matrix [2 B, P Hkv D]: the keys, then the values.
    """

    bias: Tensor | None = None
    rows: Tensor | None = None
    lengths: Tensor | None = None
    scale: float = 1.0
    window: int = 0
    position: int = 0
    dropout_p: float = 0.0
    seed: Tensor | None = None


def prefix_attend(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    base_out: Tensor,
    base_lse: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """query [B, Hq, T, D], prefixes [G, P, Hkv, D], base_out like query, base_lse [B, Hq, T].

    base_lse is +inf or -inf in rows that attend to nothing, whatever base_out is there; a NaN is
    kept. Returns out like query and lse [B, Hq, T], fp32 (float64 for float64), +inf where there is
    nothing to attend to, and out 0.
    """
    acc = accumulate_dtype(query.dtype)
    keys, values = _of_each_row(prefix_key, prefix_value, options, query.shape[0], acc)
    scores = _scores(query.to(acc), keys, options)
    base_lse = base_lse.to(acc)
    base_lse = base_lse.masked_fill(base_lse.isinf(), -torch.inf)
    lse = torch.logaddexp(base_lse, scores.logsumexp(-1))
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    out = _attended((scores - lse.unsqueeze(-1)).exp(), values)
    share = (base_lse - lse).exp().unsqueeze(-1)
    out += torch.where(base_lse.unsqueeze(-1) == -torch.inf, 0, share * base_out.to(acc))
    return out.to(query.dtype), lse


def prefix_attend_backward(
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
    """The prefix's part of the gradients, with out and lse of `prefix_attend`.

    Returns dquery like query, plus what `dquery` (of the base attention) holds where it is given,
    and dprefix_key, dprefix_value [G, P, Hkv, D] in the prefixes' dtype. None where not needed.
    """
    acc = accumulate_dtype(query.dtype)
    batch, heads, tokens, dim = query.shape
    groups, count, kv_heads, _ = prefix_key.shape
    keys, values = _of_each_row(prefix_key, prefix_value, options, batch, acc)
    scores = _scores(query.to(acc), keys, options)
    p = (scores - lse.to(acc).unsqueeze(-1)).exp()
    upper = dout.to(acc)
    delta = (upper * out.to(acc)).sum(-1, keepdim=True)
    by_group = (batch, kv_heads, heads // kv_heads, tokens)
    dp = torch.einsum("bhrtd,bjhd->bhrtj", upper.view(*by_group, dim), values).reshape(p.shape)
    ds = options.scale * p * (dp - delta)
    if need_dquery:
        added = _attended(ds, keys)
        added = added if dquery is None else added + dquery.to(acc)
        dquery = added.to(query.dtype)
    if not need_dprefix:
        return dquery if need_dquery else None, None, None
    grouped = (*by_group, count)
    dkeys = torch.einsum(
        "bhrtj,bhrtd->bjhd", ds.view(grouped), query.to(acc).reshape(*by_group, dim)
    )
    dvalues = torch.einsum("bhrtj,bhrtd->bjhd", p.view(grouped), upper.view(*by_group, dim))
    both = torch.cat([dkeys.reshape(batch, -1), dvalues.reshape(batch, -1)])
    dkeys, dvalues = dropout(both, options.dropout_p, options.seed).view(2, *dkeys.shape).unbind()
    dprefix_key = _sum_of_rows(dkeys, options.rows, groups).to(prefix_key.dtype)
    dprefix_value = _sum_of_rows(dvalues, options.rows, groups).to(prefix_value.dtype)
    return dquery if need_dquery else None, dprefix_key, dprefix_value


def _of_each_row(
    prefix_key: Tensor,
    prefix_value: Tensor,
    options: Options,
    batch: int,
    acc: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Keys and values [B, P, Hkv, D] of each batch row, dropped out."""
    both = torch.stack([prefix_key.to(acc), prefix_value.to(acc)])  # [2, G, P, Hkv, D]
    rows = options.rows
    which = rows.clamp(min=0) if rows is not None else prefix_key.new_zeros(batch).long()
    both = both[:, which]
    dropped = dropout(both.reshape(2 * batch, -1), options.dropout_p, options.seed)
    keys, values = dropped.view(both.shape).unbind()
    return keys, values


def _scores(query: Tensor, keys: Tensor, options: Options) -> Tensor:
    """[B, Hq, T, P], -inf where a key is not seen."""
    bias, rows, lengths, scale, window, position = options[:6]
    batch, heads, tokens, dim = query.shape
    count, kv_heads = keys.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, tokens, dim)
    scores = scale * torch.einsum("bhrtd,bjhd->bhrtj", grouped, keys)
    scores = scores.reshape(batch, heads, tokens, count)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    j = torch.arange(count, device=query.device)
    length = torch.full((batch,), count, device=query.device)
    if lengths is not None:
        length = lengths[:1].expand(batch) if rows is None else lengths[rows.clamp(min=0)]
    if rows is not None:
        length = length.masked_fill(rows < 0, 0)
    seen = (j < length[:, None])[:, None, None, :]
    if window > 0:
        i = torch.arange(tokens, device=query.device)[:, None]
        distance = length[:, None, None] + position + i - j  # [B, T, P]
        seen = seen & (distance < window).unsqueeze(1)
    return scores.masked_fill(~seen, -torch.inf)


def _attended(p: Tensor, values: Tensor) -> Tensor:
    """p [B, Hq, T, P] times values [B, P, Hkv, D]: [B, Hq, T, D]."""
    batch, heads, tokens, count = p.shape
    kv_heads, dim = values.shape[2:]
    grouped = p.reshape(batch, kv_heads, heads // kv_heads, tokens, count)
    return torch.einsum("bhrtj,bjhd->bhrtd", grouped, values).reshape(batch, heads, tokens, dim)


def _sum_of_rows(gradient: Tensor, rows: Tensor | None, groups: int) -> Tensor:
    """gradient [B, P, Hkv, D] summed over the batch rows that have each of the G prefixes."""
    if rows is None:
        total = gradient.new_zeros(groups, *gradient.shape[1:])
        total[0] = gradient.sum(0)
        return total
    has = rows == torch.arange(groups, device=rows.device)[:, None]  # [G, B]
    return torch.einsum("gb,bjhd->gjhd", has.to(gradient.dtype), gradient)
