"""What is read off a transformers model before prompts go in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn


class Site(NamedTuple):
    """An attention that can have a prefix in each of its layers, and the shape of its keys."""

    name: str  # "self" in models of one stack, else "encoder", "decoder" or "cross"
    layers: int
    heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Elements of one prefix position: keys and values of all layers."""
        return self.layers * 2 * self.heads * self.head_dim


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model. embedding: the input embeddings' module; hidden_size: theirs."""

    config: Any
    embedding: nn.Embedding
    hidden_size: int

    @property
    def vocabulary(self) -> int:
        return int(self.embedding.num_embeddings)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where a prefix can go. Raises ValueError where layers differ."""
        return _sites(self.config)


def geometry_of(model: Any) -> Geometry:
    """The geometry of a transformers model. Raises TypeError or ValueError for what is none."""
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) is None or not hasattr(model, "get_input_embeddings"):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    embedding: Any = model.get_input_embeddings()
    # PEFT's wrapper of a module to save forwards attributes to what it wraps.
    if not isinstance(getattr(embedding, "num_embeddings", None), int):
        raise ValueError(
            f"model: prompts need token embeddings, got {type(embedding).__name__} as the input's"
        )
    return Geometry(config, embedding, int(embedding.embedding_dim))


def _sites(config: Any) -> tuple[Site, ...]:
    if not config.is_encoder_decoder:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        return (_site("self", text, ("num_hidden_layers",), ()),)
    # Some have a config for each stack.
    encoder, decoder = (getattr(config, name, config) for name in ("encoder", "decoder"))
    decoder_layers = ("num_decoder_layers", "decoder_layers", "num_hidden_layers")
    return (
        _site("encoder", encoder, ("encoder_layers", "num_hidden_layers"), ("encoder_",)),
        _site("decoder", decoder, decoder_layers, ("decoder_",)),
        _site("cross", decoder, decoder_layers, ("decoder_",)),
    )


def _site(name: str, config: Any, layers: tuple[str, ...], stack: tuple[str, ...]) -> Site:
    count = _first(config, layers)
    heads = _first(config, (*(f"{s}attention_heads" for s in stack), "num_attention_heads"))
    key_heads = _first(config, ("num_key_value_heads",), heads)
    default = _first(config, ("hidden_size", "d_model")) // heads
    if name in ("self", "decoder"):
        _check_uniform(config)
    return Site(name, count, key_heads, _first(config, ("head_dim", "d_kv"), default))


def _check_uniform(config: Any) -> None:
    names = ("num_key_value_heads", "head_dim")
    layers = getattr(config, "per_layer_config", None) or []
    shapes = {tuple(getattr(layer, name, None) for name in names) for layer in layers}
    if len(shapes) > 1 or bool(getattr(config, "num_kv_shared_layers", None)):
        raise ValueError(f"model: layers of {config.model_type} differ in their keys and values")


def _first(config: Any, names: tuple[str, ...], default: int | None = None) -> int:
    """The first of a config's fields that is a number. (Configs know each other's names.)"""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    if default is None:
        raise ValueError(f"model: its config ({config.model_type}) has none of {list(names)}")
    return default
