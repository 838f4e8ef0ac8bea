"""Activating a composition."""

from __future__ import annotations

from collections.abc import Sequence

from peft import PeftModel
from torch import nn

from fusetune.methods.bottleneck.composition import resolve, trained_names
from fusetune.methods.bottleneck.model import BottleneckModel, Composition


def compose(
    model: nn.Module, composition: Composition, *, trainable: Sequence[str] | None = None
) -> None:
    """Activates a composition of a PEFT model's adapters: `compose(model, Stack("a", "b"))`.

    A list of names is a Stack. trainable: those of the active adapters (of a fusion: its name) that
    are trained; None: all. Of modules to save, a Stack uses the copy of the last adapter with one.

    Raises TypeError for a model without bottleneck adapters, and ValueError for a composition that
    does not fit: an unknown name, a nesting that is not allowed. What was active then stays so.
    """
    tuner = model.base_model if isinstance(model, PeftModel) else model
    if not isinstance(tuner, BottleneckModel):
        raise TypeError(f"model must have bottleneck adapters, got {type(model).__name__}")
    names = trained_names(resolve(composition, tuner.peft_config))
    unknown = sorted(set(trainable or ()) - set(names))
    if unknown:
        raise ValueError(f"trainable: {unknown} are not among the active adapters {names}")
    tuner.set_adapter(composition)
    if trainable is not None:
        tuner.freeze([name for name in names if name not in trainable])
    if isinstance(model, PeftModel):
        model.active_adapter = names[0]
