"""The attention functions registered with transformers: stock ones that know what a prefix is.

For every stock function there is one, "prefix_sdpa" for "sdpa" and so on, with the same function
for masks. It calls the stock one unless the forward pass has a prefix. With a prefix, sdpa's work
is done by ops.prefix_attention; where that cannot be exact, or the function gives no log-sum-exp to
merge by (eager), the prefix is joined to keys, values and mask for the stock function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fusetune.nn._prefix_joined import joined, prefix_bias
from fusetune.nn._prefix_layout import Stack
from fusetune.nn._prefix_stack import KEYWORD, PLACE, Call
from fusetune.nn.fused_sdpa import NAME, STOCK, seen, transformed
from fusetune.ops._registry import OPS, backend
from fusetune.ops.prefix_attention import prefix_attention

Tensor = torch.Tensor
Pair = tuple[Tensor, Tensor | None]  # out [B, T, H, D], attention weights if there are any
_NAME = "prefix_"


def switch(stack: Stack) -> None:
    """Has the stack's modules look up the function with a prefix instead of the stock one."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for config in _configs(stack.module):
        stock = config._attn_implementation or "eager"
        stock = STOCK if stock == NAME else stock  # it knows no prefixes
        if stock.startswith(_NAME):
            continue
        name = _NAME + stock
        if name not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(name, _knowing_prefixes(stock))
            # Without one, no mask is made at all, and padding is seen by everybody.
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[stock])
        config._attn_implementation_internal = name


def switch_back(stack: nn.Module) -> None:
    """Undoes `switch`."""
    for config in _configs(stack):
        if switched_config(config):
            config._attn_implementation_internal = config._attn_implementation.removeprefix(_NAME)


def switched(stack: nn.Module) -> bool:
    """Whether the modules of a stack look up what is registered here."""
    return all(map(switched_config, _configs(stack)))


def switched_config(config: Any) -> bool:
    return (config._attn_implementation or "").startswith(_NAME)


def stock_name(stack: nn.Module) -> str:
    """The name of the stock attention function, switched or not."""
    config: Any = stack.config
    return (config._attn_implementation or "eager").removeprefix(_NAME)


def _configs(stack: nn.Module) -> list[Any]:
    """The configurations that the stack and its attention modules ask, each once."""
    asked = [m for m in stack.modules() if PLACE in m.__dict__]
    return list({id(m.config): m.config for m in (stack, *asked)}.values())


# --- the function ---- ----------------------------------------------------------------------------


def _knowing_prefixes(name: str) -> Callable[..., Pair]:
    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Pair:
        stock = stock_attention(module, name)
        call: Call | None = kwargs.pop(KEYWORD, None)
        place = module.__dict__.get(PLACE)
        segment = None if call is None else call.segments.get(place)
        if call is None or segment is None:
            return stock(module, query, key, value, attention_mask, **kwargs)
        if _reason(stock, module, query, key, value, attention_mask, segment, kwargs) is not None:
            return joined(
                stock, name, module, query, key, value, attention_mask, call, segment, kwargs
            )
        return _fused(module, query, key, value, attention_mask, call, segment, kwargs)

    return attention


def stock_attention(module: Any, name: str) -> Callable[..., Pair]:
    """The function that the module's own file would have given it."""
    namespace = inspect.unwrap(type(module).forward).__globals__
    eager = namespace.get("eager_attention_forward")
    return namespace["ALL_ATTENTION_FUNCTIONS"].get_interface(name, eager)


def joined_reason(stack: nn.Module) -> str | None:
    """Why all of a stack's attention gets keys and values joined, as far as can be seen now."""
    name = stock_name(stack)
    if name != "sdpa":
        return f"{name} attention gives no log-sum-exp"
    asked = [m for m in stack.modules() if PLACE in m.__dict__]
    return "attention dropout while training" if any(map(_drops, asked)) else None


def _drops(module: Any) -> bool:
    if not module.training:
        return False
    found = [getattr(module, n, 0) for n in ("attention_dropout", "attn_dropout", "dropout")]
    rates = [p.p if isinstance(p, nn.Dropout) else p for p in found]
    return any(isinstance(p, (int, float)) and p > 0 for p in rates)


def _reason(
    stock: Callable[..., Pair],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    segment: tuple[Tensor, Tensor],
    kwargs: dict[str, Any],
) -> str | None:
    """Why this call is not the op's, but the stock function's with keys and values joined."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if stock is not sdpa_attention_forward:
        return "the attention function gives no log-sum-exp"
    if kwargs.get("dropout"):
        return "attention dropout"
    for name in ("softcap", "s_aux", "cache"):
        if kwargs.get(name) is not None:
            return name
    bias = kwargs.get("position_bias")
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return "a bias of the positions that requires a gradient"
    if mask is not None and (mask.dim() != 4 or (mask.requires_grad and torch.is_grad_enabled())):
        return "a mask of another shape, or one that requires a gradient"
    if key.shape[-1] != value.shape[-1]:
        return "values of another width than keys"
    autocast = torch.is_autocast_enabled(query.device.type)
    if not autocast and not query.dtype == key.dtype == value.dtype:
        return "mixed dtypes"
    if not torch.compiler.is_compiling() and (
        type(query) not in (Tensor, nn.Parameter) or transformed()
    ):
        return "a function transform, or a tensor of another kind"
    if backend() != "auto":
        return None
    carrier = OPS["prefix_attend"].carrier(query.device.type, query.dtype, segment[0].dtype)
    return "no kernel" if carrier == "reference" and query.dtype != torch.float64 else None


def _fused(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    call: Call,
    segment: tuple[Tensor, Tensor],
    kwargs: dict[str, Any],
) -> Pair:
    """As transformers' sdpa_attention_forward, with a prefix."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        segment = segment[0].float(), segment[1].float()
    tokens = query.shape[2]
    key, value, mask, causal = seen(module, query, key, value, mask, kwargs.get("is_causal"))
    bias = kwargs.get("position_bias")
    if bias is not None:
        bias = bias[..., : key.shape[2]]
        if causal:
            mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
            causal = False
        mask = bias if mask is None else _added(bias, mask)
    window = kwargs.get("sliding_window")
    position = 0
    if window is not None:
        position = call.position
        window = window if call.prefix.length + position + tokens > window else None
    out = prefix_attention(
        query,
        key,
        value,
        *segment,
        attn_mask=mask,
        is_causal=causal,
        scale=kwargs.get("scaling"),
        prefix_bias=prefix_bias(call, module, tokens),
        window=window,
        position=position if window is not None else 0,
        rows=call.rows,
        lengths=call.lengths,
        prefix_dropout_p=call.prefix.dropout_p,
        training=module.training,
    )
    return out.transpose(1, 2).contiguous(), None


def _added(bias: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask
