"""Attention that gives its log-sum-exp, and its gradients from any out and log-sum-exp.

The second is what merging needs: with out and lse of a softmax over more keys than these, the
gradients of these are exact. torch's flash and memory-efficient kernels do both; where neither
takes the arguments, plain matmuls do. lse is +inf in rows that attend to nothing.

Arguments are trusted: query [B, Hq, T, D], key and value [B, Hkv, S, D] of one dtype; mask: boolean
or additive, of any shape that broadcasts to [B, Hq, T, S]; causal: from the top left, without mask.
"""

from __future__ import annotations

import torch
from torch.backends import cuda

from fusetune.ops import _base_attention_cpu
from fusetune.reference import attention as reference
from fusetune.reference.attention import Options, repeated, sum_of_groups
from fusetune.reference.linear_4bit import accumulate_dtype

Tensor = torch.Tensor
aten = torch.ops.aten


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, T, D] in query's dtype, lse [B, Hq, T] fp32 (float64 for float64)."""
    if not query.numel() or not key.shape[2]:  # torch's kernels divide by these sizes
        lse = query.new_full(query.shape[:3], torch.inf, dtype=accumulate_dtype(query.dtype))
        return query.new_zeros(query.shape), lse
    bias = _additive(mask, query.dtype)
    kernel = _kernel(query, key, value, bias, causal)
    query, key, value = (_contiguous_last(t) for t in (query, key, value))
    if kernel == "cpu":
        out, lse = _base_attention_cpu.attend(query, key, value, bias, causal, scale)
    elif kernel == "flash":
        out, lse = aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, scale=scale
        )[:2]
    elif kernel == "efficient":
        out, lse = aten._scaled_dot_product_efficient_attention(
            query,
            repeated(key, query),
            repeated(value, query),
            _for_efficient(bias, query, key),
            True,
            0.0,
            causal,
            scale=scale,
        )[:2]
        lse = lse[..., : query.shape[2]]
    else:
        return reference.attention(query, key, value, Options(bias, causal, scale))
    return out, _inf_where_masked(lse, bias)


def attend_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dquery, dkey, dvalue) of this segment of the softmax that out and lse are of."""
    if not query.numel() or not key.shape[2]:
        return query.new_zeros(query.shape), torch.zeros_like(key), torch.zeros_like(value)
    bias = _additive(mask, query.dtype)
    kernel = _kernel(query, key, value, bias, causal)
    dout, query, key, value = (_contiguous_last(t) for t in (dout, query, key, value))
    if kernel == "cpu":
        return _base_attention_cpu.attend_backward(
            dout, query, key, value, bias, causal, scale, out, lse
        )
    if kernel == "flash":
        tokens, keys = query.shape[2], key.shape[2]
        nothing = torch.empty(0, dtype=torch.int64, device=query.device)  # of dropout
        return aten._scaled_dot_product_flash_attention_backward(
            *(dout, query, key, value, out, lse, None, None, tokens, keys, 0.0, causal),
            *(nothing, nothing),
            scale=scale,
        )
    if kernel == "efficient":
        return _efficient_backward(dout, query, key, value, bias, causal, scale, out, lse)
    options = Options(bias, causal, scale)
    return reference.attention_backward(dout, query, key, value, out, lse, options)


# --- which kernel ---- ----------------------------------------------------------------------------


def _kernel(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool) -> str:
    """ "cpu", "flash", "efficient" or "plain"."""
    if query.device.type == "cpu":
        return "cpu"
    if query.device.type != "cuda":
        return "plain"
    grouped = query.shape[1] != key.shape[1]
    params = cuda.SDPAParams(query, key, value, bias, 0.0, causal, grouped)
    if bias is None and cuda.can_use_flash_attention(params):
        return "flash"
    key, value = repeated(key, query), repeated(value, query)
    params = cuda.SDPAParams(query, key, value, bias, 0.0, causal, False)
    return "efficient" if cuda.can_use_efficient_attention(params) else "plain"


def _contiguous_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as what is added to scores, of 2 or 4 dimensions."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
    elif mask.dtype != dtype and (mask.dtype != torch.float32 or dtype == torch.float64):
        mask = mask.to(dtype)
    return mask if mask.dim() == 2 else mask[(None,) * (4 - mask.dim())]


def _inf_where_masked(lse: Tensor, bias: Tensor | None) -> Tensor:
    """torch's kernels differ in what they say of a row whose keys are all masked."""
    if bias is None:
        return lse
    if lse.device.type == "cpu" and not (lse == 0).any():  # what the CPU's kernel says
        return lse
    return lse.masked_fill((bias == -torch.inf).all(-1).expand_as(lse), torch.inf)


# --- torch's memory-efficient kernel ---- ---------------------------------------------------------


def _for_efficient(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """In the query's dtype, expanded, and with rows at multiples of 16 bytes."""
    if bias is None:
        return None
    keys = key.shape[2]
    padded = torch.nn.functional.pad(bias.to(query.dtype), (0, -bias.shape[-1] % 8))[..., :keys]
    return padded.expand(*query.shape[:3], keys)


def _efficient_backward(
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
    # Its lse has rows of a multiple of 32.
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)
    nothing = torch.empty((), dtype=torch.int64, device=query.device)  # of dropout
    dquery, dkey, dvalue, _ = aten._scaled_dot_product_efficient_attention_backward(
        *(dout, query, repeated(key, query), repeated(value, query)),
        *(_for_efficient(bias, query, key), out, lse, nothing, nothing, 0.0),
        *([True, True, True, False], causal),
        scale=scale,
    )
    return dquery, sum_of_groups(dkey, key), sum_of_groups(dvalue, value)
