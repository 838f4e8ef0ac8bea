"""A training step of PEFT's prompt tuning on SmolLM2-135M: what the prompt costs but its tokens.

    python -m benchmarks.prompt_tuning
    python -m benchmarks.prompt_tuning --json out.json

Steps take turns on the same tokens: the model without a prompt, 8 x 128; without one, but with as
many more tokens as the prompt is long, 8 x 148; PEFT's prompt tuning, P = 20, stock; and fused. All
go back to the input's embeddings. Ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fusetune
from benchmarks import figures
from benchmarks.prefix_tuning import FOLDER, base_folder
from fusetune.bench.in_turn import in_turn

BATCH, TOKENS, PROMPT = 8, 128, 20
LONGER = "no prompt, as many positions"


def make(folder: Path) -> Any:
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT)
    return get_peft_model(model, config).train()


def steps_of(model: Any) -> dict[str, Callable[[], float]]:
    """One training step of each kind; the loss over the vocabulary is fused in all of them."""
    ids = torch.randint(1000, 40000, (BATCH, TOKENS + PROMPT))
    embedding = model.word_embeddings

    def plain(length: int) -> Callable[[], float]:
        def step() -> float:
            embedded = embedding(ids[:, :length]).requires_grad_()
            mask = torch.ones(BATCH, length, dtype=torch.int64)
            base = model.get_base_model()
            return run(base, inputs_embeds=embedded, attention_mask=mask, labels=ids[:, :length])

        return step

    def prompted() -> float:
        given = ids[:, :TOKENS]
        return run(model, input_ids=given, attention_mask=torch.ones_like(given), labels=given)

    def stock() -> float:
        kind, model.__class__ = model.__class__, model.stock_class
        try:
            return prompted()
        finally:
            model.__class__ = kind

    fusetune.fuse(model)
    return {
        "no prompt": plain(TOKENS),
        LONGER: plain(TOKENS + PROMPT),
        "stock": stock,
        "fused": prompted,
    }


def run(model: Any, **arguments: Any) -> float:
    loss = model(**arguments, use_cache=False).loss
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.item()


def measure(steps: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    turns = in_turn(list(steps), lambda kind, number: steps[kind](), rounds)
    return {
        name: {
            "step_s": turns.median(name),
            "to_as_many_positions": turns.ratio(name, LONGER),
            "loss": turns.losses[name][-1],
        }
        for name in steps
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, default=FOLDER, help="the model, made where missing")
    parser.add_argument("--rounds", type=int, default=5)
    options = figures.parsed(parser)
    found = measure(steps_of(make(base_folder(options.base))), options.rounds)
    for name, row in found.items():
        print(
            f"{name:<30} {row['step_s']:.3f} s a step, {row['to_as_many_positions']:.3f} of "
            f"the step on as many positions; loss {row['loss']:.6f}"
        )
    figures.write(options, found)


if __name__ == "__main__":
    main()
