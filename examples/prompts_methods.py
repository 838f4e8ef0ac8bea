"""The methods that prompts_smollm2 compares, and how each is trained and measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

import fusetune

from .smollm2 import CUE, load, load_tokenizer, next_token
from .training import Texts, Trainer, batches, collate

LENGTH = 10  # of the prompts
BATCH = 16


@dataclass(frozen=True)
class Method:
    """`config`: PEFT's, from the tokenizer's folder. rate: the best of `rates` (prompts_rates)."""

    name: str
    rates: tuple[float, ...]
    rate: float
    config: Callable[[str], Any]


def _template(folder: str) -> Any:
    # The cue stays as it is, between pseudo-tokens: an anchor.
    template = [LENGTH // 2, "{0}", LENGTH - LENGTH // 2, CUE]
    return fusetune.PTuningConfig(
        template=template, tokenizer_name_or_path=folder, task_type="CAUSAL_LM"
    )


PROMPT = {"num_virtual_tokens": LENGTH, "task_type": "CAUSAL_LM"}
METHODS = (
    Method(
        "prompt tuning",
        (1e-2, 3e-2, 1e-1),
        1e-1,
        lambda folder: fusetune.PromptTuningConfig(init="sampled_vocab", init_seed=0, **PROMPT),
    ),
    Method("P-tuning", (3e-3, 1e-2, 3e-2), 1e-2, _template),
    Method(
        "P-tuning v2",
        (3e-2, 1e-1, 3e-1),
        1e-1,
        lambda folder: fusetune.PTuningV2Config(**PROMPT),
    ),
    Method(
        "prefix tuning",
        (3e-4, 1e-3, 3e-3),
        3e-4,
        lambda folder: fusetune.PrefixTuningConfig(prefix_projection=True, **PROMPT),
    ),
    Method(
        "LoRA",
        (1e-3, 3e-3, 1e-2),
        3e-3,
        lambda folder: LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    ),
)
NAMES = {method.name.lower().replace(" ", "-"): method for method in METHODS}


@dataclass
class Trained:
    """A model after its training; `losses` and `seconds` are those of the steps."""

    model: Any
    trainer: Trainer
    losses: list[float]
    seconds: list[float]


def train(
    method: Method, rate: float, folder: Path, texts: Texts, steps: int, seed: int = 0
) -> Trained:
    """Trains a method on a model of its own, from glosses alone.

    seed: of weights and batches.
    """
    torch.manual_seed(seed)
    model = get_peft_model(load(folder), method.config(str(folder)))
    fusetune.fuse(model)
    asked = ask(model, folder, texts)
    trained = Trained(model, Trainer(partial(next_token, model), [(model, rate)], steps), [], [])
    for batch in batches(asked, BATCH, steps, seed):
        begin = time.perf_counter()
        trained.losses.append(trained.trainer.step(batch))
        trained.seconds.append(time.perf_counter() - begin)
    return trained


def ask(model: Any, folder: Path, texts: Texts) -> Texts:
    """The texts as questions: the cue behind them, or the model's template around them."""
    config = model.active_peft_config
    if not isinstance(config, fusetune.PTuningConfig):
        return with_cue(texts, load_tokenizer(folder))
    return Texts([config.fill([ids]) for ids in texts.ids], texts.targets)


def with_cue(texts: Texts, tokenizer: Any) -> Texts:
    cue = tokenizer(CUE).input_ids
    return Texts([ids + cue for ids in texts.ids], texts.targets)


@torch.no_grad()
def measure(model: Any, asked: Texts) -> tuple[float, float]:
    """(mean loss, share of texts whose category is the likeliest of all categories)"""
    model.eval()
    order = sorted(range(len(asked)), key=lambda row: len(asked.ids[row]))
    among = torch.tensor(sorted(set(asked.targets)))
    loss = right = 0.0
    for at in range(0, len(order), BATCH):
        arguments, targets = collate(asked, order[at : at + BATCH])
        found = next_token(model, **arguments)
        loss += functional.cross_entropy(found, targets, reduction="sum").item()
        right += (among[found[:, among].argmax(1)] == targets).sum().item()
    return loss / len(asked), right / len(asked)
