"""Where the sub-layers of a model are, so that adapters go in without a rewritten forward.

An adapter sits on the module whose output is h: what a sub-layer gives before its residual input r
is added. The model's own code then computes LN(h' + r), or h' + r, or r + LN(h'), with the h' that
the adapter returns. Paths are those of transformers 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Location:
    """One sub-layer. Paths are relative to the layer.

    output: the module that returns h. residual, argument: the module that is called with r, and
    which of its arguments that is (a number, or a name for one passed by name). norm: the LayerNorm
    that closes the sub-layer: LN(h + r), or r + LN(h) with `norm_on_branch`.
    """

    output: str
    residual: str
    argument: int | str = 0
    norm: str | None = None
    norm_on_branch: bool = False


@dataclass(frozen=True)
class Layers:
    """A list of layers at `path` (relative to the backbone), all alike."""

    path: str
    attention: Location
    ffn: Location
    cross: Location | None = None


@dataclass(frozen=True)
class Architecture:
    """A model: its lists of layers, in the order their layers are numbered.

    tokens: the first list's first layer gets embeddings of tokens, so that an invertible adapter
    makes sense there.
    """

    layers: tuple[Layers, ...]
    tokens: bool = True


@dataclass(frozen=True)
class Place:
    """One location of one layer of a model. key: path of the module that returns h."""

    key: str
    kind: str  # attention, cross, ffn
    layer: int
    layer_key: str
    location: Location


ARCHITECTURES: dict[str, Architecture] = {}


def register_architecture(model_type: str, architecture: Architecture) -> None:
    """Makes models of a type (`config.model_type`) known. Raises TypeError."""
    if not isinstance(architecture, Architecture):
        raise TypeError(f"architecture must be an Architecture, got {type(architecture).__name__}")
    ARCHITECTURES[model_type] = architecture


def architecture_from_dict(described: dict[str, Any]) -> Architecture:
    """The reverse of `dataclasses.asdict`, as a config file holds it. Raises ValueError."""
    parts = _checked("architecture", described, Architecture)
    layers = []
    for entry in parts["layers"]:
        found = _checked("architecture: layers", entry, Layers)
        path = found.pop("path")
        locations = {
            kind: Location(**_checked(f"architecture: {kind}", value, Location))
            for kind, value in found.items()
            if value is not None
        }
        layers.append(Layers(path, **locations))
    return Architecture(tuple(layers), parts.get("tokens", True))


def _checked(name: str, value: Any, kind: type[Any]) -> dict[str, Any]:
    known = {f.name for f in fields(kind)}
    required = {f.name for f in fields(kind) if f.default is MISSING}
    if not isinstance(value, dict) or not required <= set(value) <= known:
        raise ValueError(
            f"{name} must be a dict with the keys {sorted(required)} and perhaps "
            f"{sorted(known - required)}, got {value!r}"
        )
    return dict(value)


def architecture_of(model: nn.Module) -> Architecture:
    """The table's entry for a model. Raises ValueError, saying how to add one."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    raise ValueError(
        f"{type(model).__name__} (model_type {model_type!r}) is not in the table of architectures: "
        f"{sorted(ARCHITECTURES)}. Describe it, once for all by fusetune.methods."
        "register_architecture(model_type, Architecture(layers=(Layers(path='encoder.layer', "
        "attention=Location(output=..., residual=..., norm=...), ffn=Location(...)),))), or in the "
        "config: BottleneckConfig(architecture=dataclasses.asdict(...))"
    )


def backbone_prefix(model: nn.Module) -> str:
    """Path of the model without its head, with a dot; empty where it is the model itself."""
    name = getattr(model, "base_model_prefix", "")
    return f"{name}." if name and isinstance(getattr(model, name, None), nn.Module) else ""


def places(model: nn.Module, architecture: Architecture) -> Iterator[Place]:
    """All places of a model. Raises ValueError for a path that the model does not have."""
    prefix = backbone_prefix(model)
    number = 0
    for layers in architecture.layers:
        for index, layer in enumerate(_submodule(model, prefix + layers.path).children()):
            for kind in ("attention", "cross", "ffn"):
                location = getattr(layers, kind)
                layer_key = f"{prefix}{layers.path}.{index}"
                # Cross-attention is there or not, by the model's config.
                if location is None or (kind == "cross" and not _has(layer, location.residual)):
                    continue
                for path in (location.output, location.residual, location.norm):
                    if path is not None:
                        _submodule(model, f"{layer_key}.{path}")
                key = f"{layer_key}.{location.output}"
                yield Place(key, kind, number, layer_key, location)
            number += 1


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"architecture: {type(model).__name__} has no module {path!r}") from error


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


# --- the table ------------------------------------------------------------------------------------

_BERT = Architecture(
    (
        Layers(
            "encoder.layer",
            Location(
                "attention.output.dropout", "attention.output", 1, "attention.output.LayerNorm"
            ),
            Location("output.dropout", "output", 1, "output.LayerNorm"),
            Location(
                "crossattention.output.dropout",
                "crossattention.output",
                1,
                "crossattention.output.LayerNorm",
            ),
        ),
    )
)
_LLAMA = Architecture(
    (
        Layers(
            "layers",
            Location("self_attn.o_proj", "input_layernorm"),
            Location("mlp.down_proj", "post_attention_layernorm"),
        ),
    )
)
# Gemma 2 and 3 normalise before and after a sub-layer, and add r to the normalised.
_GEMMA = Architecture(
    (
        Layers(
            "layers",
            Location("self_attn.o_proj", "input_layernorm", 0, "post_attention_layernorm", True),
            Location(
                "mlp.down_proj", "pre_feedforward_layernorm", 0, "post_feedforward_layernorm", True
            ),
        ),
    )
)
ARCHITECTURES.update(
    bert=_BERT,
    roberta=_BERT,
    distilbert=Architecture(
        (
            Layers(
                "transformer.layer",
                Location("attention.out_lin", "attention", 0, "sa_layer_norm"),
                Location("ffn.dropout", "ffn", 0, "output_layer_norm"),
            ),
        )
    ),
    # Its dropout after a sub-layer, one module for both, comes after the adapter.
    vit=Architecture(
        (
            Layers(
                "layers",
                Location("attention.o_proj", "layernorm_before"),
                Location("mlp.fc2", "layernorm_after"),
            ),
        ),
        tokens=False,
    ),
    gpt2=Architecture(
        (
            Layers(
                "h",
                Location("attn.resid_dropout", "ln_1"),
                Location("mlp.dropout", "ln_2"),
                Location("crossattention.resid_dropout", "ln_cross_attn"),
            ),
        )
    ),
    t5=Architecture(
        (
            Layers(
                "encoder.block",
                Location("layer.0.dropout", "layer.0.layer_norm"),
                Location("layer.1.dropout", "layer.1.layer_norm"),
            ),
            Layers(
                "decoder.block",
                Location("layer.0.dropout", "layer.0.layer_norm"),
                Location("layer.2.dropout", "layer.2.layer_norm"),
                Location("layer.1.dropout", "layer.1.layer_norm"),
            ),
        )
    ),
    llama=_LLAMA,
    mistral=_LLAMA,
    qwen2=_LLAMA,
    qwen3=_LLAMA,
    gemma=_LLAMA,
    gemma2=_GEMMA,
    gemma3_text=_GEMMA,
)
