"""transformers' sdpa attention by ops.attention, on CPUs.

Registered under a name of its own beside "sdpa", with sdpa's masks; `switch` changes the name in a
model's configuration. What the op cannot carry out exactly, or no faster, is the stock function's.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from fusetune.ops._base_attention_cpu import is_faster_for, is_faster_in
from fusetune.ops._registry import OPS, backend
from fusetune.ops.attention import attention

Tensor = torch.Tensor
NAME, STOCK = "fused_sdpa", "sdpa"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_RATES = ("attention_dropout", "attn_dropout", "dropout", "dropout_prob")
_OTHERS = ("softcap", "s_aux", "cache", "position_bias")  # arguments that are not the op's


def looks_up(module: nn.Module) -> bool:
    """Whether a module takes its attention function from transformers' interface.

    Not those that give it a bias of the positions (T5): it may require a gradient.
    """
    kind: Any = type(module)
    return _looks_up(kind) and not hasattr(module, "has_relative_attention_bias")


def holder(module: nn.Module) -> str | None:
    """What an attention module calls the rate at which it drops its weights; None: it drops none.

    A number, or a module of torch's Dropout that is never called.
    """
    if not looks_up(module):
        return None
    return next((name for name in _RATES if _rate(getattr(module, name, None)) > 0), None)


def _rate(held: Any) -> float:
    value = held.p if isinstance(held, nn.Dropout) else held
    return float(value) if isinstance(value, (int, float)) else 0.0


@functools.cache
def _looks_up(kind: Any) -> bool:
    """Whether modules of this class take their attention function from the interface."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def name_of(module: Any) -> str:
    """Of the attention function that a module looks up."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None) or "eager"


def switch(module: Any) -> None:
    """Has a module look up this function instead of sdpa, and all that share its configuration."""
    if name_of(module) == STOCK:
        register()
        module.config._attn_implementation_internal = NAME


def switch_back(module: Any) -> None:
    """Undoes `switch`."""
    if name_of(module) == NAME:
        module.config._attn_implementation_internal = STOCK


def register() -> None:
    """Makes the function known to transformers; a copied or loaded model needs it too."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
        # Without one, no mask is made at all, and padding is seen by everybody.
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[STOCK])


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As transformers' sdpa_attention_forward: out [B, T, H, D], None."""
    if not _fusable(query, key, value, attention_mask, dropout, kwargs):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        stock: Any = ALL_ATTENTION_FUNCTIONS[STOCK]
        rest = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        result: tuple[Tensor, Tensor | None] = stock(
            module, query, key, value, attention_mask, **rest
        )
        return result
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    key, value, mask, causal = seen(module, query, key, value, attention_mask, is_causal)
    out = attention(
        *(query, key, value),
        attn_mask=mask,
        is_causal=causal,
        scale=scaling,
        dropout_p=dropout,
    )
    return out.transpose(1, 2).contiguous(), None


def seen(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool | None,
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """(key, value, mask, whether it is causal) of a call, as transformers' sdpa takes them."""
    tokens = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and tokens > 1 and mask is None
    if causal and key.shape[2] > tokens:  # an empty static cache: what comes is not written yet
        key, value = key[:, :, :tokens], value[:, :, :tokens]
    return key, value, None if mask is None else mask[..., : key.shape[2]], causal


def transformed() -> bool:
    """Whether a tracer or a transform of functions has to see each operator."""
    return (
        torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _fusable(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> bool:
    """Whether the op does all that the call asks for, and faster."""
    plain = all(type(t) in (Tensor, nn.Parameter) for t in (query, key, value))
    if not plain or query.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if mask is not None and (mask.dim() != 4 or (mask.requires_grad and torch.is_grad_enabled())):
        return False
    if key.shape != value.shape or any(kwargs.get(name) is not None for name in _OTHERS):
        return False
    autocast = torch.is_autocast_enabled("cpu")
    if not autocast and not query.dtype == key.dtype == value.dtype:
        return False
    dtype = torch.get_autocast_dtype("cpu") if autocast else query.dtype
    faster = is_faster_in(dtype) and is_faster_for(query.shape[2], key.shape[2])
    if transformed() or not (dropout or faster):
        return False
    return dtype in _DTYPES and (
        backend() != "auto" or OPS["attention"].carrier("cpu", dtype, None) != "reference"
    )
