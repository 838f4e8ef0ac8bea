"""Softmax attention with dropout of its weights, and its gradients, in plain PyTorch.

    p = softmax(scale query key^T + bias)     out = m p value

m is the mask of the dropout times 1 / (1 - rate), a matrix [B Hq T, S] (reference/dropout.py).
Srivastava et al. 2014 (JMLR 15), as Vaswani et al. 2017 (arXiv:1706.03762, section 5.4) and BERT
use it. With lse the logarithm of the softmax's denominator and g = m (dout . value_j),

    p_j = e^(s_j - lse)    dvalue_j = m_j p_j dout    ds_j = p_j (g_j - dout . out)
    dquery = scale sum_j ds_j key_j                   dkey_j = scale ds_j query

A log-sum-exp of +inf stands for a row that sees nothing: its weights are 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusetune.reference.dropout import keep_mask, threshold_and_scale
from fusetune.reference.linear_4bit import accumulate_dtype

Tensor = torch.Tensor


class Options(NamedTuple):
    """mask: boolean, or added to the scores; broadcast to [B, Hq, T, S]. causal: without a mask."""

    mask: Tensor | None = None
    causal: bool = False
    scale: float = 1.0
    dropout_p: float = 0.0
    seed: Tensor | None = None


def attention(query: Tensor, key: Tensor, value: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """query [B, Hq, T, D], key, value [B, Hkv, S, D]: out [B, Hq, T, D] in their dtype, and lse.

    lse: [B, Hq, T], fp32 (float64 for float64).
    """
    scores = _scores(query, key, options)
    lse = scores.logsumexp(-1)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    weights = (scores - lse.unsqueeze(-1)).exp()
    weights = weights * _factors(weights, options)
    return (weights @ repeated(value, query).to(weights.dtype)).to(query.dtype), lse


def attention_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dquery, dkey, dvalue), each in its tensor's dtype."""
    p = (_scores(query, key, options) - lse.unsqueeze(-1)).exp()
    factors, upper = _factors(p, options), dout.to(p.dtype)
    delta = (upper * out.to(p.dtype)).sum(-1, keepdim=True)
    ds = options.scale * p * (factors * (upper @ repeated(value, query).to(p.dtype).mT) - delta)
    dquery = ds @ repeated(key, query).to(p.dtype)
    dkey = sum_of_groups(ds.mT @ query.to(p.dtype), key)
    dvalue = sum_of_groups((p * factors).mT @ upper, value)
    return dquery.to(query.dtype), dkey.to(key.dtype), dvalue.to(value.dtype)


def _scores(query: Tensor, key: Tensor, options: Options) -> Tensor:
    acc = accumulate_dtype(query.dtype)
    scores = options.scale * query.to(acc) @ repeated(key, query).to(acc).mT
    if options.causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        return scores.masked_fill(~seen, -torch.inf)
    if options.mask is None:
        return scores
    if options.mask.dtype == torch.bool:
        return scores.masked_fill(~options.mask, -torch.inf)
    return scores + options.mask.to(acc)


def _factors(weights: Tensor, options: Options) -> Tensor | float:
    """What the dropout multiplies the weights [B, Hq, T, S] by."""
    if options.seed is None:
        return 1.0
    rows, keys = weights.shape[:3].numel(), weights.shape[3]
    kept = keep_mask(rows, keys, options.dropout_p, options.seed).view(weights.shape)
    return kept.to(weights.dtype) * threshold_and_scale(options.dropout_p)[1]


def repeated(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values for every head of the query."""
    times = query.shape[1] // x.shape[1]
    return x if times == 1 else x.repeat_interleave(times, 1)


def sum_of_groups(gradient: Tensor, x: Tensor) -> Tensor:
    """gradient [B, Hq, S, D] summed over the query heads that share a head of x [B, Hkv, S, D]."""
    if gradient.shape == x.shape:
        return gradient
    return gradient.unflatten(1, (x.shape[1], -1)).sum(2)
