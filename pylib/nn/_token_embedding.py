"""Whether ops.prompt_embed can stand for a model's token embeddings, and by what they scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

Tensor = torch.Tensor

# What makes the output of an embedding require a gradient, for checkpointing; see require_grad_as.
_GRADIENT_HOOKS = {"make_inputs_require_grads", "make_inputs_require_grad"}


def stock_reason(embedding: Any) -> str | None:
    """Why the module itself has to be called; None where its weight and scale are all there is."""
    if not isinstance(embedding, nn.Embedding) or scale_of(embedding) is None:
        return f"the token embeddings are a {type(embedding).__name__}"
    if "forward" in embedding.__dict__:
        return "the token embeddings have a forward of their own"
    hooks = [*embedding._forward_hooks.values()]
    foreign = [hook for hook in hooks if getattr(hook, "__name__", "") not in _GRADIENT_HOOKS]
    if foreign or embedding._forward_pre_hooks or embedding._backward_hooks:
        return "the token embeddings have hooks"
    if type(embedding.weight) is not nn.Parameter or hasattr(embedding.weight, "ds_id"):
        return "the token embeddings' weight is not a plain parameter"
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
        return "the token embeddings have max_norm, scale_grad_by_freq or sparse"
    return None


def scale_of(embedding: Any) -> float | None:
    """What the module multiplies embeddings by; None for a class that is not known."""
    kind = type(embedding)
    if kind is nn.Embedding:
        return 1.0
    ours = kind.__module__.startswith("transformers.models.")
    if not (ours and kind.__name__.endswith("ScaledWordEmbedding")):
        return None
    scale = getattr(embedding, "scalar_embed_scale", embedding.embed_scale)
    if isinstance(embedding.embed_scale, Tensor):  # then it is rounded to the weight's dtype
        return float(torch.tensor(scale, dtype=embedding.weight.dtype, device="cpu"))
    return float(scale)


def require_grad_as(embedding: nn.Module, embedded: Tensor) -> Tensor:
    """What the module's hooks for gradient checkpointing would have done to its output."""
    if embedding._forward_hooks and torch.is_grad_enabled() and not embedded.requires_grad:
        embedded.requires_grad_(True)
    return embedded
