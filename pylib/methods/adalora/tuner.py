"""Finds PEFT's AdaLoRA tuner in a model."""

from __future__ import annotations

from typing import Any

from peft.tuners.adalora import AdaLoraModel
from torch import nn

WALK = "_fusetune_walk"  # in the tuner: the allocator's `Walk` of its last step


def tuner_of(model: nn.Module) -> Any:
    """The `AdaLoraModel` in a model. Raises TypeError, or ValueError where there is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, AdaLoraModel):
            return module
    raise ValueError(
        f"model, a {type(model).__name__}, has no AdaLoRA adapter: wrap it by "
        "get_peft_model(model, AdaLoraConfig(...))"
    )


def trained_adapter(tuner: Any) -> str:
    """The name of the adapter whose ranks are allocated. Raises ValueError."""
    name: str | None = tuner.__dict__.get("trainable_adapter_name")
    if name is None:
        raise ValueError(
            "model has AdaLoRA adapters for inference only: load it with is_trainable=True"
        )
    return name
