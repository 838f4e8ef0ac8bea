"""Part two: adapters of three tasks, fused for a fourth one that has few texts.

Each source task knows some of WordNet's labels: those of things, of notions, of verbs. The target
has all labels (with those of adjectives and adverbs, which no source saw) and few texts of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

import fusetune

from .minilm import load_encoder
from .training import Tensor, Texts, Trainer, only

THINGS = {"animal", "artifact", "body", "food", "location", "object", "person", "plant"}
THINGS |= {"substance"}
RATE, HEAD_RATE, FUSION_RATE = 2e-3, 5e-3, 5e-4
SOURCES = ("things", "notions", "verbs")


def source_of(label: str) -> str | None:
    """Which source task has a label, such as "noun.animal"."""
    part, _, rest = label.partition(".")
    if part == "verb":
        return "verbs"
    if part == "noun":
        return "things" if rest in THINGS else "notions"
    return None


class Tasks:
    """One encoder with adapters, and a head for each task."""

    def __init__(self, labels: list[str]) -> None:
        self.labels = labels
        config = fusetune.BottleneckConfig.pfeiffer(init_weights_seed=0)
        self.model = get_peft_model(load_encoder(), config, SOURCES[0])
        for name in (*SOURCES[1:], "target"):
            config = fusetune.BottleneckConfig.pfeiffer(init_weights_seed=0)
            self.model.add_adapter(name, config)
        self.model.add_adapter("fused", fusetune.AdapterFusionConfig(adapters=list(SOURCES)))
        self.hidden = self.model.base_model.model.config.hidden_size

    def trainer(self, active: Any, trained: list[str], rate: float, steps: int) -> Trainer:
        """A new head on a composition (None: on the bare encoder) of which `trained` is trained."""
        if active is None:
            self.model.requires_grad_(False)
        else:
            fusetune.compose(self.model, active, trainable=trained)
        torch.manual_seed(0)
        head = nn.Linear(self.hidden, len(self.labels))

        def logits(**arguments: Tensor) -> Tensor:
            if active is not None:
                return head(self.model(**arguments))
            with self.model.disable_adapter():
                return head(self.model(**arguments))

        return Trainer(logits, [(head, HEAD_RATE), (self.model, rate)], steps)


def run(
    train: Texts,
    few: Texts,
    held_out: Texts,
    labels: list[str],
    size: int,
    steps: tuple[int, int],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Accuracies on held-out texts. train: the sources' texts; few: the target's; steps: of a
    source, of the target."""
    source_steps, target_steps = steps
    tasks = Tasks(labels)
    sources = {}
    for name in SOURCES:
        numbers = [n for n, label in enumerate(labels) if source_of(label) == name]
        trainer = tasks.trainer(name, [name], RATE, source_steps)
        trainer.fit(only(train, numbers), size, source_steps)
        accuracy = trainer.accuracy(only(held_out, numbers))
        sources[name] = {"labels": len(numbers), "accuracy": accuracy}
        progress(f"source task {name}: {accuracy:.1%} of {len(numbers)} labels")

    targets: dict[str, tuple[Any, list[str], float]] = {
        "no adapter": (None, [], 0.0),
        "a new adapter": ("target", ["target"], RATE),
        **{f"adapter of {name}, frozen": (name, [], 0.0) for name in SOURCES},
        "fusion of the three": ("fused", ["fused"], FUSION_RATE),
    }
    found = {}
    for name, (active, trained, rate) in targets.items():
        trainer = tasks.trainer(active, trained, rate, target_steps)
        trainer.fit(few, size, target_steps)
        found[name] = trainer.accuracy(held_out)
        progress(f"{name}: {found[name]:.1%}")
    return {
        "sources": sources,
        "accuracy": found,
        "texts": len(few),
        "labels": len(labels),
    }
