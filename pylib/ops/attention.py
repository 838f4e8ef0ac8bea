"""attention: softmax attention with dropout of its weights, in one pass each way.

On a CPU PyTorch has no fused attention with dropout: it writes scores, weights, the mask and the
dropped weights, and keeps three of them for the backward pass. Here none of them leaves the cache,
and what is kept is the result, a log-sum-exp for each query and the dropout's seed.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from fusetune.ops import _cpu
from fusetune.ops._attention_arguments import check_mask, check_tokens
from fusetune.ops._registry import Impl, Op, define, plain
from fusetune.reference import attention as reference
from fusetune.reference.attention import Options
from fusetune.reference.dropout import new_seed
from fusetune.reference.linear_4bit import accumulate_dtype

Tensor = torch.Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """dropout(softmax(scale query key^T + mask)) value (Vaswani et al. 2017, arXiv:1706.03762).

    query: [B, Hq, T, D]; key, value: [B, Hkv, S, D], Hq a multiple of Hkv; all float16, bfloat16,
    float32 or float64. Returns [B, Hq, T, D]. attn_mask (boolean or additive, broadcast to
    [B, Hq, T, S]; without a gradient), is_causal (from the top left) and scale (1 / sqrt(D) unless
    given) mean what they mean to scaled_dot_product_attention. A query that sees nothing gets
    zeros. dropout_p: of the weights, with `training`, by a seed from torch's generator.

    Differentiable, once, in query, key and value. Raises TypeError or ValueError, naming the
    argument, for shapes, dtypes, devices or values that do not fit.
    """
    check_tokens(query, key, value)
    check_mask(query, key, attn_mask, is_causal)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be from 0 to 1, got {dropout_p}")
    dropped = training and dropout_p > 0
    options = Options(
        mask=attn_mask,
        causal=is_causal,
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else float(scale),
        dropout_p=float(dropout_p) if dropped else 0.0,
        seed=new_seed(query.device) if dropped else None,
    )
    if torch.compiler.is_compiling() or not all(map(plain, (query, key, value))):
        out: Tensor = _op(query, key, value, *options)[0]
        return out
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        out = _Attention.apply(query, key, value, options)
        return out
    return _forward(query, key, value, options)[0]


# --- implementations ------------------------------------------------------------------------------


class JoinedPrefix(NamedTuple):
    """Further keys and values [G, P, Hkv, D]; rows: int64 [B], which each batch row sees (or -1).

    One pass does both segments: query and result are read and written once.
    """

    key: Tensor
    value: Tensor
    rows: Tensor | None


def _described(
    query: Tensor, key: Tensor, value: Tensor, options: Options, prefix: JoinedPrefix | None
) -> tuple[Any, ...]:
    """The kernels' description, and the mask it points to, which must outlive it."""
    batch, heads, tokens, dim = query.shape
    bias = _bias(options.mask, (batch, heads, tokens, key.shape[2]))
    sizes = (batch, heads, key.shape[1], tokens, key.shape[2], dim)
    drop = _cpu.dropout(options.dropout_p, options.seed)
    tensors = (*map(_cpu.heads, (query, key, value)), _cpu.distances(bias))
    joined: tuple[Any, ...] = (_cpu.heads(None), _cpu.heads(None), 1, 0, 0)
    if prefix is not None:
        keys_values = (_cpu.heads(t.transpose(1, 2)) for t in prefix[:2])
        joined = (*keys_values, *prefix.key.shape[:2], _cpu.address(prefix.rows))
    return (sizes, *tensors, options.causal, options.scale, drop, joined), bias


def _bias(mask: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """The mask as what is added to scores, fp32, expanded, with contiguous rows."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
    mask = mask.detach().resolve_neg().float()
    if mask.dim() == 0 or mask.shape[-1] != shape[-1] or mask.stride(-1) != 1:
        mask = mask.expand(*mask.shape[:-1], shape[-1]).contiguous()
    return mask.expand(shape)


def _like(x: Tensor) -> Tensor:
    """[B, H, T, D] without gaps, a token's heads beside each other: as models join them."""
    batch, heads, tokens, dim = x.shape
    return _cpu.empty(batch, tokens, heads, dim, dtype=x.dtype).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    x = x.resolve_neg()
    return x if x.stride(-1) == 1 else x.contiguous()


def cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, options: Options, prefix: JoinedPrefix | None = None
) -> tuple[Tensor, Tensor]:
    """out like query and lse [B, Hq, T]. The tensors of a prefix have contiguous rows."""
    query, key, value = map(_rows, (query, key, value))
    out, lse = _like(query), _cpu.empty(*query.shape[:3], dtype=torch.float32)
    described, _bias = _described(query, key, value, options, prefix)
    _cpu.kernels().attention(described, _cpu.heads(out), lse.data_ptr())
    return out, lse


def cpu_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    prefix: JoinedPrefix | None = None,
    dprefix: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """(dquery, dkey, dvalue). dprefix: where the gradients of a prefix go, fp32 without gaps."""
    dout, query, key, value, out = map(_rows, (dout, query, key, value, out))
    grads = _like(query), _like(key), _like(value)
    described, _bias = _described(query, key, value, options, prefix)
    lse = lse.contiguous()
    upper = _cpu.heads(dout), _cpu.heads(out), lse.data_ptr()
    _cpu.kernels().attention_backward(
        described, *upper, *map(_cpu.heads, grads), *map(_cpu.address, dprefix)
    )
    return grads


OP = Op(
    "attention",
    Impl("cpu", cpu_forward, _cpu.supports("attention"), 10),
    Impl("reference", reference.attention, lambda case: None, 0),
)
OP_BACKWARD = Op(
    "attention_backward",
    Impl("cpu", cpu_backward, _cpu.supports("attention_backward"), 10),
    Impl("reference", reference.attention_backward, lambda case: None, 0),
)


def _forward(query: Tensor, key: Tensor, value: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = OP.run(query.device.type, query.dtype, None)(
        query, key, value, options
    )
    return out


def _backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    run = OP_BACKWARD.run(query.device.type, query.dtype, None)
    grads: tuple[Tensor, Tensor, Tensor] = run(dout, query, key, value, out, lse, Options(*options))
    return grads


# --- autograd, eager ------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        out, lse = _forward(query, key, value, options)
        ctx.save_for_backward(query, key, value, out, lse, options.mask, options.seed)
        ctx.options = options._replace(mask=None, seed=None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, mask, seed = ctx.saved_tensors
        grads = _backward(dout, *tensors, *ctx.options._replace(mask=mask, seed=seed))
        return *grads, None


# --- torch.library: what torch.compile, export and fake tensors see -------------------------------


def _run(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    out, lse = _forward(query, key, value, Options(*options))
    return _laid_out(out), lse


def _run_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(map(_laid_out, _backward(*arguments)))


def _laid_out(x: Tensor) -> Tensor:
    """x [B, H, T, D] as `_like` lays it out."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _fake_like(x: Tensor) -> Tensor:
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _fake(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(query.dtype)
    return _fake_like(query), query.new_empty(query.shape[:3], dtype=acc)


def _fake_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return _fake_like(query), _fake_like(key), _fake_like(value)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    options = Options(*inputs[3:])
    ctx.save_for_backward(*inputs[:3], *output, options.mask, options.seed)
    ctx.options = options._replace(mask=None, seed=None)


def _library_backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, mask, seed = ctx.saved_tensors
    grads = _op_backward(dout, *tensors, *ctx.options._replace(mask=mask, seed=seed))
    return *grads, *[None] * len(ctx.options)


_OPTIONS = "Tensor? mask, bool causal, float scale, float dropout_p, Tensor? seed"
_op = define(
    f"attention(Tensor query, Tensor key, Tensor value, {_OPTIONS}) -> (Tensor, Tensor)",
    _run,
    _fake,
    _library_backward,
    _setup_context,
)
_op_backward = define(
    "attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
