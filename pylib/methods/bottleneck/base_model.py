"""What is read off a model before adapters go in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from fusetune.methods.bottleneck.architectures import Place
from fusetune.methods.bottleneck.layer import BottleneckLayer

# Parts of the names of adapters' own parameters, and of what PEFT wraps around modules.
_OWN = {
    *("down", "up", "gate", "norm_before", "norm_after", "scaling", "weight", "bias"),
    *("F", "G", "query", "key", "value", "steps", *BottleneckLayer.adapter_layer_names),
    *("base_layer", "base_model", "model", "modules_to_save", "original_module"),
}


def check_name(name: str, model: nn.Module) -> None:
    """PEFT tells adapters apart by parts of parameters' names; some names cannot be told.

    Raises ValueError for those: a module or a parameter of the model or of an adapter has them.
    """
    parts = {part for key, _ in model.named_parameters() for part in key.split(".")}
    if "." in name or hasattr(nn.ModuleDict, name) or not name:
        raise ValueError(f"adapter_name: {name!r} cannot name a module")
    if name in parts | _OWN:
        raise ValueError(
            f"adapter_name: {name!r} is also the name of a module or a parameter, so that "
            "PEFT could not tell whose weights are the adapter's"
        )


def hidden_size_of(model: nn.Module, found: Sequence[Place]) -> int:
    """H, by the model's config, else by the modules at its places. Raises ValueError."""
    size = getattr(getattr(model, "config", None), "hidden_size", None)
    if isinstance(size, int):
        return size
    place = found[0]
    for path in (place.key, f"{place.layer_key}.{place.location.norm}"):
        module: Any = model.get_submodule(path)
        if isinstance(getattr(module, "out_features", None), int):
            return int(module.out_features)
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            return int(module.weight.shape[-1])
    raise ValueError("the model's config has no hidden_size, and its modules do not show it")


def norms_of(model: nn.Module) -> list[str]:
    """Paths of the model's own normalisation layers."""
    wrapped = [n for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    inside = [n for n, m in model.named_modules() if isinstance(m, BottleneckLayer)]
    found = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in (*wrapped, *inside)):
            continue
        original = getattr(module, "original_module", module)
        if type(original).__name__.endswith(("LayerNorm", "RMSNorm")):
            found.append(name)
    return found
