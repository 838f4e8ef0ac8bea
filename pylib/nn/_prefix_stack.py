"""The hooks that give a stack's forward pass its prefix.

The stack's own hook moves positions behind the prefix and puts a `Call` among the keyword
arguments, which transformers' layers pass down to the attention function. A layer's hook acts
under reentrant checkpointing only, see `_Gate`. All hooks are functions of this module, and what
they know lies in the modules: copies and replicas of a model have their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fusetune.nn import cache_argument
from fusetune.nn._prefix_layout import Stack, _kind, bias_owner, parameters

if TYPE_CHECKING:
    from fusetune.nn.prefix_attention import Prefix

Tensor = torch.Tensor
ACTIVE = "_fusetune_prefix"  # in a stack: the Prefix of the moment
KEYWORD = "fusetune_prefix"  # the Call, in a forward's keyword arguments
# In an attention module: (place, layer). Not of fuse's names, which go when the class changes.
PLACE = "_prefix_place"
_PLACES = "_fusetune_places"  # in a stack or layer: those of its attention modules
_OWNER = "_fusetune_bias_owner"  # in a stack: the name of T5's module with the positions' table
_SHIFT = "_fusetune_shift"  # in a module of positions: how far to move them, for one call


@dataclass
class Call:
    """A prefix in one forward pass of a stack. `lengths` is a tensor here, int64 [G]."""

    prefix: Prefix
    rows: Tensor | None
    lengths: Tensor | None
    seen: int | Tensor  # tokens in the cache before this pass's
    bias_owner: Any  # the T5Attention that has the table of relative positions, or None
    segments: dict[tuple[str, int], tuple[Tensor, Tensor]]
    biases: dict[int, Tensor] = field(default_factory=dict)  # by owner

    @property
    def position(self) -> int:
        return int(self.seen)


def install(stack: Stack) -> None:
    """Hooks a stack; once is enough."""
    remove(stack.module)
    layers = checkpointed_layers(stack)
    for inside, place in stack.attention.items():
        stack.module.get_submodule(inside).__dict__[PLACE] = place
    stack.module.__dict__[_PLACES] = tuple(stack.attention.values())
    stack.module.__dict__[_OWNER] = bias_owner(stack.module)
    stack.module.register_forward_pre_hook(_enter_stack, with_kwargs=True)
    for name, own in layers.items():
        layer = stack.module.get_submodule(name)
        layer.__dict__[_PLACES] = tuple(own)
        layer.register_forward_pre_hook(_enter_layer, with_kwargs=True)
    embed = _position_module(stack.module)
    if embed is not None:
        embed.register_forward_hook(_move_embedded, with_kwargs=True)


def remove(stack: nn.Module) -> None:
    """Leaves no trace of `install`."""
    for module in stack.modules():
        for key in (ACTIVE, PLACE, _PLACES, _OWNER, _SHIFT):
            module.__dict__.pop(key, None)
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = getattr(module, kind)
            for number in [n for n, hook in hooks.items() if hook in _HOOKS]:
                del hooks[number]
                getattr(module, f"{kind}_with_kwargs").pop(number, None)


def held(stack: nn.Module) -> tuple[tuple[str, int], ...]:
    """The places of an installed stack's attention modules."""
    return stack.__dict__[_PLACES]


def checkpointed_layers(stack: Stack) -> dict[str, list[tuple[str, int]]]:
    """The stack's layers, by name -> places of the attention modules in each."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: dict[str, list[tuple[str, int]]] = {}
    for inside, place in stack.attention.items():
        name = inside
        while not isinstance(stack.module.get_submodule(name), GradientCheckpointingLayer):
            name = name.rpartition(".")[0]
        layers.setdefault(name, []).append(place)
    return layers


# --- the stack ---- -------------------------------------------------------------------------------


def _enter_stack(
    stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    prefix: Prefix | None = stack.__dict__.get(ACTIVE)
    embed = _position_module(stack)
    if embed is not None:
        embed.__dict__.pop(_SHIFT, None)  # of a pass that failed before it came to its positions
    own = held(stack)
    if prefix is None or not any(place in prefix.layers for place, _ in own):
        return None
    names = parameters(_kind(stack))
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        return None  # the model's own complaint
    call = _call(stack, prefix, tokens, cache_argument.given(kwargs))
    if any(place != "cross" and place in prefix.layers for place, _ in own):
        _move(stack, call, names, tokens, kwargs)
    if (
        kwargs.get("use_cache") is None
        and cache_argument.given(kwargs) is None
        and "use_cache" in names
        and stack.training
        and torch.is_grad_enabled()
    ):
        kwargs["use_cache"] = False  # nobody reads it, and it would copy every key and value
    kwargs[KEYWORD] = call
    return (), kwargs


def _call(stack: Any, prefix: Prefix, tokens: Tensor, cache: Any) -> Call:
    rows = prefix.rows
    if rows is not None and len(rows) != len(tokens):
        times, rest = divmod(len(tokens), max(len(rows), 1))
        if rest or not times:
            raise ValueError(
                f"rows of the prefix: one for each row of the batch, got {len(rows)} for "
                f"{len(tokens)}"
            )
        rows = rows.repeat_interleave(times)
    lengths = None
    if prefix.lengths is not None:
        lengths = torch.tensor(prefix.lengths, device=tokens.device)
    if rows is not None:
        rows = rows.to(tokens.device)
    seen = 0 if cache is None or isinstance(cache, tuple) else cache.get_seq_length()
    seen = seen.clone() if isinstance(seen, Tensor) else seen  # a static cache counts in place
    segments = {}
    for place, layer in held(stack):
        layers = prefix.layers.get(place, ())
        pair = layers[layer] if layer < len(layers) else None
        if pair is not None:
            segments[place, layer] = pair
    owner = stack.__dict__[_OWNER]
    owner_module = None if owner is None else stack.get_submodule(owner)
    return Call(prefix, rows, lengths, seen, owner_module, segments)


def _move(
    stack: Any, call: Call, names: tuple[str, ...], tokens: Tensor, kwargs: dict[str, Any]
) -> None:
    """Positions behind the prefix, and a mask without the prefix's columns."""
    mask = kwargs.get("attention_mask")
    counted = call.prefix.counted
    if counted and isinstance(mask, Tensor) and mask.dim() == 2:
        kwargs["attention_mask"] = mask = mask[:, counted:]
    given = kwargs.get("position_ids")
    if given is not None and counted:
        kwargs["position_ids"] = given = given - counted
    shift = _shift(call)
    embed = _position_module(stack)
    if embed is not None:
        embed.__dict__[_SHIFT] = shift
        return
    if "position_ids" not in names:
        return  # relative ones
    if given is None:
        kwargs["position_ids"] = _default_positions(stack, call, tokens, shift)
        return
    kwargs["position_ids"] = given + shift
    if mask is None and cache_argument.given(kwargs) is None and "attention_mask" in names:
        # Positions without mask or cache would be taken for packed sequences, which a model with
        # a prefix in its cache never sees.
        kwargs["attention_mask"] = tokens.new_ones(tokens.shape[:2], dtype=torch.long)


def _shift(call: Call) -> int | Tensor:
    """How far positions move: P, or [B, 1] by the length of each row's prefix."""
    if call.rows is None:
        return call.prefix.length if call.prefix.lengths is None else call.prefix.lengths[0]
    if call.lengths is None:
        length: Tensor | int = call.prefix.length
    else:
        length = call.lengths[call.rows.clamp(min=0)]
    return ((call.rows >= 0) * length).unsqueeze(1)


def _default_positions(
    stack: Any, call: Call, tokens: Tensor, shift: int | Tensor
) -> Tensor | None:
    """What the model would take without `position_ids`, moved."""
    embeddings: Any = getattr(stack, "embeddings", None)
    if hasattr(embeddings, "create_position_ids_from_input_ids"):  # RoBERTa: padding stays put
        if tokens.dim() != 2:
            return None  # from embeddings it counts without regard to a cache
        padding = embeddings.padding_idx
        positions: Tensor = embeddings.create_position_ids_from_input_ids(tokens, padding)
        return torch.where(tokens == padding, positions, positions + call.seen + shift)
    positions = torch.arange(tokens.shape[1], device=tokens.device) + call.seen
    return positions.unsqueeze(0) + shift


def _position_module(stack: Any) -> nn.Module | None:
    """The module of learned or sinusoidal positions that counts them itself (BART, OPT)."""
    embed = stack._modules.get("embed_positions")
    if embed is None or cache_argument.length_name(parameters(_kind(embed))) is None:
        return None
    return embed


def _move_embedded(embed: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Any:
    """The embeddings of positions, of moved ones instead."""
    shift = embed.__dict__.pop(_SHIFT, None)
    if shift is None:
        return None
    given = {**dict(zip(parameters(_kind(embed)), args, strict=False)), **kwargs}
    if isinstance(shift, int):
        return embed.forward(**_moved(embed, given, shift))
    by_row = [
        embed.forward(**_moved(embed, given, row)).expand(1, *out.shape[-2:]) for row in shift[:, 0]
    ]
    return torch.cat(by_row)


def _moved(embed: Any, given: dict[str, Any], shift: int | Tensor) -> dict[str, Any]:
    positions = given.get("position_ids")
    if positions is None:
        name = cache_argument.length_name(parameters(_kind(embed)))
        assert name is not None  # _position_module has looked
        return {**given, name: given.get(name, 0) + shift}
    # OPT gives padding the position -1.
    return {**given, "position_ids": torch.where(positions < 0, positions, positions + shift)}


# --- a layer ---- ---------------------------------------------------------------------------------


def _enter_layer(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Under reentrant checkpointing: leaves for the layer to compute with, behind a gate."""
    call: Call | None = kwargs.get(KEYWORD)
    if call is None or not args or not _reentrant(layer):
        return None
    own = {
        place: call.segments[place] for place in layer.__dict__[_PLACES] if place in call.segments
    }
    given = [tensor for pair in own.values() for tensor in pair]
    if not any(tensor.requires_grad for tensor in given):
        return None
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in given]
    pairs = zip(leaves[::2], leaves[1::2], strict=True)
    segments = {**call.segments, **dict(zip(own, pairs, strict=True))}
    hidden = _Gate.apply(args[0], leaves, *given)
    return (hidden, *args[1:]), {**kwargs, KEYWORD: replace(call, segments=segments)}


def _reentrant(layer: Any) -> bool:
    if not (layer.gradient_checkpointing and layer.training and torch.is_grad_enabled()):
        return False
    function = layer._gradient_checkpointing_func
    return getattr(function, "keywords", {}).get("use_reentrant") is not False


class _Gate(torch.autograd.Function):
    """hidden as it is; backward, the gradients that came to rest in leaves since.

    A reentrant checkpoint runs a backward pass of its own over what it recomputes. Tensors that it
    closes over would be walked through to their origin in every layer; leaves stop it, and when
    the gradient of `hidden`, the layer's input, arrives here, theirs is complete.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, leaves: list[Tensor], *given: Tensor) -> Tensor:
        ctx.leaves = leaves
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, dhidden: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return dhidden if ctx.needs_input_grad[0] else None, None, *gradients


_HOOKS: tuple[Any, ...] = (_enter_stack, _enter_layer, _move_embedded)
