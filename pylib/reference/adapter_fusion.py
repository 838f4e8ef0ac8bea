"""AdapterFusion (Pfeiffer et al. 2021, arXiv:2005.00247) and its attention, in plain PyTorch.

    q = query W_q^T + b_q        k_i = values_i W_k^T + b_k
    s_i = drop(q . k_i)          p = softmax_i(s / temperature)
    out = sum_i p_i values_i W_v^T + residual

for every token on its own, over N adapters. `adapter_fusion` computes just that. `fusion_attend`
is what is left of it once keys and values are not projected, with g = q W_k in the query's place:

    q . k_i = (q W_k) . values_i + q . b_k
    sum_i p_i values_i W_v^T = (sum_i p_i values_i) W_v^T

q . b_k is the same for all i, so the softmax cancels it unless scores are dropped out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusetune.reference.dropout import dropout
from fusetune.reference.linear_4bit import accumulate_dtype

Tensor = torch.Tensor


def adapter_fusion(
    query: Tensor,
    values: Tensor,
    query_weight: Tensor | None,
    query_bias: Tensor | None,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
    value_weight: Tensor | None,
    temperature: float,
    dropout_p: float,
    seed: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """query [..., H], values [N, ..., H] -> (out [..., H] in values' dtype, p [..., N]).

    Weights [H, H]; None: the identity. The dropout's mask is that of a [M, N] matrix, M tokens.
    """
    acc = accumulate_dtype(torch.promote_types(query.dtype, values.dtype))
    stack = values.to(acc).movedim(0, -2)  # [..., N, H]
    q = _linear(query.to(acc), query_weight, query_bias)
    k = _linear(stack, key_weight, key_bias)
    v = _linear(stack, value_weight, None)
    scores = (k @ q.unsqueeze(-1)).squeeze(-1)
    rows = dropout(scores.reshape(-1, scores.shape[-1]), dropout_p, seed)
    p = (rows.view_as(scores) / temperature).softmax(-1)
    out = (p.unsqueeze(-2) @ v).squeeze(-2)
    if residual is not None:
        out = out + residual.to(acc)
    return out.to(values.dtype), p


def _linear(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        return x
    y = x @ weight.to(x.dtype).T
    return y if bias is None else y + bias.to(x.dtype)


def fusion_attend(
    g: Tensor,
    values: Sequence[Tensor],
    offset: Tensor | None,
    temperature: float,
    dropout_p: float,
    seed: Tensor | None,
    first_row: int = 0,
) -> tuple[Tensor, Tensor]:
    """g [M, H], values stacks [n, M, H] of N adapters in all, offset [M] -> (ctx [M, H], p [M, N]).

    p = softmax(drop(g . values_i + offset) / temperature), ctx = sum_i p_i values_i. ctx is in g's
    dtype, p in fp32 (float64 for float64). first_row: where g, offset and the results are a block
    of rows: which one of values, and of the dropout's matrix, is its first.
    """
    acc = accumulate_dtype(g.dtype)
    stack = torch.cat([part[:, first_row : first_row + len(g)].to(acc) for part in values])
    scores = torch.einsum("mh,nmh->mn", g.to(acc), stack)
    if offset is not None:
        scores += offset.to(acc)[:, None]
    p = (dropout(scores, dropout_p, seed, first_row) / temperature).softmax(1)
    return torch.einsum("mn,nmh->mh", p, stack).to(g.dtype).contiguous(), p.contiguous()


def fusion_attend_backward(
    dctx: Tensor,
    g: Tensor,
    values: Sequence[Tensor],
    p: Tensor,
    temperature: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dvalues: bool,
    first_row: int = 0,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """(dg [M, H] in g's dtype, dvalues like values, doffset [M] like p).

        dp_i = dctx . values_i       ds_i = drop'(p_i (dp_i - sum_j p_j dp_j)) / temperature
        dg = sum_i ds_i values_i     dvalues_i = p_i dctx + ds_i g       doffset = sum_i ds_i

    dvalues is empty where it is not needed. first_row: as in fusion_attend;
    dvalues are the block's.
    """
    acc = accumulate_dtype(g.dtype)
    stack = torch.cat([part[:, first_row : first_row + len(g)].to(acc) for part in values])
    upper = dctx.to(acc)
    dp = torch.einsum("mh,nmh->mn", upper, stack)
    ds = p * (dp - (p * dp).sum(1, keepdim=True))
    ds = dropout(ds / temperature, dropout_p, seed, first_row)
    dg = torch.einsum("mn,nmh->mh", ds, stack).to(g.dtype).contiguous()
    if not need_dvalues:
        return dg, [], ds.sum(1)
    dvalues = []
    first = 0
    for part in values:
        mine = slice(first, first + len(part))
        d = torch.einsum("mn,mh->nmh", p[:, mine], upper)
        d += torch.einsum("mn,mh->nmh", ds[:, mine], g.to(acc))
        dvalues.append(d.to(part.dtype).contiguous())
        first += len(part)
    return dg, dvalues, ds.sum(1)
