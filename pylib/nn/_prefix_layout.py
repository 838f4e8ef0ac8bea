"""Where a transformers model attends: its stacks of layers, and the attention modules in them.

A stack is the innermost model that owns layers: it makes masks and positions (LlamaModel,
BertModel, T5's encoder and decoder). An attention module calls what `AttentionInterface` gives it.
"""

from __future__ import annotations

import functools
import inspect
import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fusetune.nn import cache_argument

_CROSS = re.compile(r"cross|encdec|encoder_attn", re.IGNORECASE)


@dataclass
class Stack:
    """A stack and what is in it, by names relative to it, in the order of the layers."""

    module: nn.Module
    name: str  # relative to the model
    place: str  # of its self-attention: "self", or "encoder" or "decoder"
    attention: dict[str, tuple[str, int]] = field(default_factory=dict)  # -> place, layer


def stacks(model: Any) -> list[Stack]:
    """The stacks of a transformers model whose attention can get a prefix."""
    from transformers import PreTrainedModel

    found: dict[str, Stack] = {}
    for name, module in model.named_modules():
        if not is_attention(module):
            continue
        owner = name
        while owner and not isinstance(model.get_submodule(owner), PreTrainedModel):
            owner = owner.rpartition(".")[0]
        stack = found.setdefault(owner, Stack(model.get_submodule(owner), owner, "self"))
        inside = name[len(owner) :].lstrip(".")
        kind = "cross" if _CROSS.search(inside) else "self"
        layer = module.layer_idx
        if layer is None:
            layer = sum(place == kind for place, _ in stack.attention.values())
        stack.attention[inside] = (kind, layer)
    chosen = list(found.values())
    if getattr(model.config, "is_encoder_decoder", False):
        for stack in chosen:
            crosses = any(place == "cross" for place, _ in stack.attention.values())
            stack.place = "decoder" if crosses else "encoder"
            for inside, (place, layer) in stack.attention.items():
                stack.attention[inside] = (stack.place if place == "self" else place, layer)
    else:  # of several, as beside a vision tower, the one of the text
        text = model.config.get_text_config()
        chosen = [stack for stack in chosen if stack.module.config is text] or chosen
    return chosen


def is_attention(module: nn.Module) -> bool:
    """Whether a module is a layer's attention that looks its function up in the interface."""
    return hasattr(module, "layer_idx") and "ALL_ATTENTION_FUNCTIONS" in _names(_kind(module))


def _kind(module: nn.Module) -> Any:
    return type(module)


@functools.cache
def _names(kind: Any) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return () if code is None else tuple(code.co_names)


@functools.cache
def parameters(kind: Any) -> tuple[str, ...]:
    """The names of a forward's parameters that may be given by position, self left out."""
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    given = inspect.signature(kind.forward).parameters.values()
    return tuple(p.name for p in given if p.kind in places)[1:]


@functools.cache
def _takes_keywords(kind: Any) -> bool:
    given = inspect.signature(kind.forward).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in given)


def unsupported(model: nn.Module) -> str | None:
    """Why a model's attention cannot get a prefix; None where it can."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return f"{type(model).__name__} is not a transformers model"
    found = stacks(model)
    if not found:
        return f"{type(model).__name__} does not take its attention from AttentionInterface"
    if len({stack.place for stack in found}) != len(found):
        return f"{type(model).__name__} has {len(found)} stacks of attention layers"
    return next(filter(None, map(_stack_reason, found)), None)


def _stack_reason(stack: Stack) -> str | None:
    config: Any = stack.module.config
    name = type(stack.module).__name__
    implementation = (config._attn_implementation or "eager").removeprefix("prefix_")
    if "flex" in implementation or "|" in implementation:
        return f"{implementation} attention has no form with a prefix"
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return "chunked attention: its chunks would count the prefix"
    if not movable(stack.module):
        return f"{name} gives its layers positions that cannot be moved past a prefix"
    windowed = getattr(config, "sliding_window", None) is not None
    for inside in stack.attention:
        attention: Any = stack.module.get_submodule(inside)
        if windowed and not getattr(attention, "is_causal", True):
            return "a sliding window in both directions"
        if getattr(attention, "reorder_and_upcast_attn", False) and implementation == "eager":
            return f"{type(attention).__name__} has an eager attention of its own"
        if reason := _path_reason(stack, inside):
            return reason
    return None


def movable(stack: nn.Module) -> bool:
    """Whether positions can be moved: an argument, a module of positions, or relative ones."""
    if "position_ids" in parameters(_kind(stack)):
        return True
    embed = getattr(stack, "embed_positions", None)
    if embed is not None:
        return cache_argument.length_name(parameters(_kind(embed))) is not None
    return bias_owner(stack) is not None


def bias_owner(stack: nn.Module) -> str | None:
    """The attention module whose table of relative positions the whole stack uses (T5)."""
    for name, module in stack.named_modules():
        if getattr(module, "has_relative_attention_bias", False) and hasattr(
            module, "compute_bias"
        ):
            return name
    return None


def _path_reason(stack: Stack, inside: str) -> str | None:
    """Why a keyword given to the stack would not arrive at the attention module."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    path = [stack.module]
    for part in inside.split("."):
        path.append(path[-1].get_submodule(part))
    for module in path:
        if not isinstance(module, nn.ModuleList) and not _takes_keywords(_kind(module)):
            return f"{type(module).__name__} does not pass keyword arguments on to its attention"
    if not any(isinstance(module, GradientCheckpointingLayer) for module in path):
        return f"the layers of {type(stack.module).__name__} are not GradientCheckpointingLayers"
    return None
