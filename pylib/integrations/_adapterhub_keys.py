"""Where AdapterHub's checkpoints keep what: the keys of our modules' parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from fusetune.methods.bottleneck.adapter import BottleneckAdapter
from fusetune.methods.bottleneck.architectures import (
    Place,
    architecture_of,
    backbone_prefix,
    places,
)
from fusetune.methods.bottleneck.config import BottleneckConfig
from fusetune.methods.bottleneck.coupling import Coupling
from fusetune.methods.bottleneck.fusion import AdapterFusion
from fusetune.methods.bottleneck.layer import BottleneckLayer, is_wanted

Tensor = torch.Tensor


class Layout(NamedTuple):
    """Of a model's layers. attention, ffn, cross: path inside a layer; None: none there.

    renamed: the path of the list of layers in transformers 5 and in adapters, if they differ.
    plugged: adapters puts hooks into the model, and has no class of its own for it.
    """

    attention: str | None
    ffn: str | None
    cross: str | None = None
    renamed: tuple[str, str] | None = None
    plugged: bool = False


_BERT = Layout("attention.output", "output")
_OWN_MODULES = Layout("attention_adapters", "output_adapters")
_PLUGGED = _OWN_MODULES._replace(plugged=True)
LAYOUTS = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": _OWN_MODULES,
    "vit": Layout(
        "attention_adapters", "output.output_adapters", renamed=("layers.", "encoder.layer.")
    ),
    "gpt2": _OWN_MODULES,
    "llama": _OWN_MODULES,
    "mistral": _OWN_MODULES,
    "qwen2": _PLUGGED,
    "qwen3": _PLUGGED,
    "gemma": _PLUGGED,
    "gemma2": _PLUGGED,
    "gemma3_text": _PLUGGED,
}
# T5's sub-layers are themselves a list: the place's own path says which.
_T5 = "t5"


def check_known(model_type: str) -> None:
    """Raises ValueError for a model that AdapterHub's format says nothing about."""
    known = [*LAYOUTS, _T5]
    if model_type not in known:
        raise ValueError(f"model: no AdapterHub layout for model_type {model_type!r}, only {known}")


def is_plugged(model_type: str) -> bool:
    return model_type in LAYOUTS and LAYOUTS[model_type].plugged


def bottleneck_layers(model: nn.Module) -> list[BottleneckLayer]:
    return [module for module in model.modules() if isinstance(module, BottleneckLayer)]


def parameters(model: nn.Module, base: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """(key without the base model's name, parameter) of an adapter or a fusion.

    model: the PEFT model; base: the transformers model in it. A parameter that adapters writes
    twice comes twice.
    """
    model_type = base.config.model_type
    prefix = backbone_prefix(base)
    for layer in bottleneck_layers(model):
        path = _path(model_type, layer.place, prefix)
        if name in layer.bn_adapters:
            for key, parameter in _adapter(layer.bn_adapters[name]):
                yield f"{path}.adapters.{name}.{key}", parameter
        if name in layer.bn_fusions:
            for key, parameter in _fusion(layer.bn_fusions[name]):
                yield f"{path}.adapter_fusion_layer.{name}.{key}", parameter
        if name in layer.bn_couplings:
            coupling = layer.bn_couplings[name]
            assert isinstance(coupling, Coupling)
            owner = "encoder." if model_type == _T5 else ""
            for key, parameter in coupling.named_parameters():
                yield f"{owner}invertible_adapters.{name}.{key}", parameter


def unused_fusion_paths(base: Any, members: Sequence[BottleneckConfig]) -> Iterator[str]:
    """Where adapters has modules of a fusion without an adapter to fuse: in layers left out."""
    everywhere = [replace(member, leave_out=[]) for member in members]
    for place in places(base, architecture_of(base)):
        used = any(is_wanted(member, place) for member in members)
        if not used and any(is_wanted(member, place) for member in everywhere):
            yield _path(base.config.model_type, place, backbone_prefix(base))


def _path(model_type: str, place: Place, prefix: str) -> str:
    """The module that has the adapters of a place in adapters' model."""
    layer = place.layer_key.removeprefix(prefix)
    if model_type == _T5:
        return f"{layer}.{place.location.output.removesuffix('.dropout')}"
    layout = LAYOUTS[model_type]
    inside = getattr(layout, place.kind)
    if inside is None:
        raise ValueError(f"adapters has no {place.kind} adapters in {model_type} models")
    if layout.renamed is not None:
        ours, theirs = layout.renamed
        layer = theirs + layer.removeprefix(ours)
    return f"{layer}.{inside}"


def _adapter(adapter: Any) -> Iterator[tuple[str, Tensor]]:
    assert isinstance(adapter, BottleneckAdapter)
    down = 0
    modules: list[tuple[str, nn.Module | None]] = [("adapter_up", adapter.up)]
    if adapter.norm_before is not None:
        # In front of the linear layer in a sequence, and by a name of its own.
        modules += [("adapter_down.0", adapter.norm_before)]
        modules += [("adapter_norm_before", adapter.norm_before)]
        down = 1
    modules += [(f"adapter_down.{down}", adapter.down)]
    modules += [("adapter_norm_after", adapter.norm_after), ("gate", adapter.gate)]
    for name, module in modules:
        if module is not None:
            for key, parameter in module.named_parameters():
                yield f"{name}.{key}", parameter
    if isinstance(adapter.scale, Tensor):
        yield "scaling", adapter.scale


def _fusion(fusion: Any) -> Iterator[tuple[str, Tensor]]:
    assert isinstance(fusion, AdapterFusion)
    yield from fusion.named_parameters()
