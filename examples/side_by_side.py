"""Part one: ways to fine-tune the encoder, on the same texts and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fusetune
from fusetune.bench.in_turn import in_turn
from fusetune.demo.memory import MIB, PeakMeter

from .minilm import MeanPooled, load_classifier
from .training import Texts, Trainer, batches

HEAD_RATE = 5e-3  # of the new head, the same for all


@dataclass(frozen=True)
class Method:
    """A way to fine-tune. rate: its learning rate, a usual one; none was tuned on these texts.

    load: the model of so many labels, that `prepare` puts the method into. trainer: for methods
    that do more in a step.
    """

    name: str
    rate: float
    prepare: Callable[[MeanPooled], nn.Module]
    load: Callable[[int], MeanPooled] = load_classifier
    trainer: type[Trainer] = Trainer


def head_only(model: MeanPooled) -> nn.Module:
    model.bert.requires_grad_(False)
    return model


def bias_only(model: MeanPooled) -> nn.Module:
    """Ben Zaken et al. 2022 (BitFit): biases, and the head."""
    for name, parameter in model.bert.named_parameters():
        parameter.requires_grad_(name.endswith(".bias"))
    return model


def with_peft(config: Any) -> Callable[[MeanPooled], nn.Module]:
    def prepare(model: MeanPooled) -> nn.Module:
        adapted = get_peft_model(model, config())
        fusetune.fuse(adapted)
        return adapted

    return prepare


HEAD = {"modules_to_save": ["classifier"]}
METHODS = (
    Method("head only", 5e-3, head_only),
    Method("bias only", 5e-3, bias_only),
    Method(
        "LoRA",
        2e-3,
        with_peft(lambda: LoraConfig(r=16, target_modules=["query", "value"], **HEAD)),
    ),
    Method("Pfeiffer", 2e-3, with_peft(lambda: fusetune.BottleneckConfig.pfeiffer(**HEAD))),
    Method("Houlsby", 2e-3, with_peft(lambda: fusetune.BottleneckConfig.houlsby(**HEAD))),
    Method("full", 2e-4, lambda model: model),
)


def make(method: Method, labels: int, steps: int) -> Trainer:
    model = method.load(labels)
    head = model.classifier
    tuned = method.prepare(model)
    if tuned is not model:  # PEFT trains a copy of what is in modules_to_save
        head = tuned.base_model.model.classifier
    return method.trainer(tuned, [(head, HEAD_RATE), (tuned, method.rate)], steps)


def accuracies(
    methods: Iterable[Method],
    train: Texts,
    held_out: Texts,
    labels: int,
    size: int,
    steps: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """name -> accuracy on the held-out texts, and numbers of parameters trained."""
    found = {}
    for method in methods:
        trainer = make(method, labels, steps)
        trainer.fit(train, size, steps)
        found[method.name] = {"accuracy": trainer.accuracy(held_out), **trained(trainer)}
        progress(f"{method.name}: {found[method.name]['accuracy']:.1%}")
    return found


def trained(trainer: Trainer) -> dict[str, int]:
    """How many parameters are, of the method and of the head."""
    head = sum(p.numel() for p in trainer.modules[0].parameters() if p.requires_grad)
    everything = sum(p.numel() for p in trainer.parameters)
    return {"parameters": everything - head, "head_parameters": head}


def costs(
    methods: Iterable[Method], train: Texts, labels: int, size: int, rounds: int
) -> dict[str, Any]:
    """name -> seconds of a step, and memory in MiB; steps of all methods take turns.

    Memory: what a step on the longest batch adds at its peak to what the process held before it, as
    the kernel's high-water mark says, and the optimiser's state. The weights, in all methods alike,
    are not in it. None where the system does not tell.
    """
    fixed = list(batches(train, size, 4))
    trainers = {method.name: make(method, labels, rounds + 3) for method in methods}
    turns = in_turn(
        list(trainers),
        lambda name, turn: trainers[name].step(fixed[(turn - 1) % len(fixed)]),
        rounds,
    )
    # Apart from the times: the meter hands memory back, which the step then has to get again.
    longest = max(fixed, key=lambda batch: batch[0]["input_ids"].numel())
    peaks: dict[str, list[float]] = {name: [] for name in trainers}
    for name, trainer in trainers.items():
        for _ in range(2):
            with PeakMeter(torch.device("cpu")) as meter:
                trainer.step(longest)
            peaks[name] += [] if meter.peak is None else [meter.peak.extra]
    return {
        name: {
            "step_s": turns.median(name),
            "memory_mib": max(peaks[name]) + _state_mib(trainer) if peaks[name] else None,
        }
        for name, trainer in trainers.items()
    }


def _state_mib(trainer: Trainer) -> float:
    states = trainer.optimizer.state.values()
    tensors = [value for state in states for value in state.values() if torch.is_tensor(value)]
    return sum(t.numel() * t.element_size() for t in tensors) / MIB
