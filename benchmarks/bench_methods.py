"""Every method on a real model: what a layer calls, the time of a training step, and its memory.

    python -m benchmarks.bench_methods                        all of it; the decoder is made once
    python -m benchmarks.bench_methods --methods lora ia3 --part time
    python -m benchmarks.bench_methods --json benchmarks/results/methods.json \\
        --plot docs/methods.png                               what benchmarks.readme renders

Methods of language models on SmolLM2-135M, those of encoders on MiniLM, both in fp32 on the CPU.
Fused steps are against stock PEFT's. Where PEFT has no such method it is the same model with the
method in torch's own operators.

calls   operators of torch that work on data, and kernels of ours, of one layer: those of a model of
        three layers less those of one with two, forward and backward; of a layer without a method
        too.
time    a forward and backward pass, of both kinds in turn: stock, fused, fused, stock, ... The
        model trains, and the losses of each pair are compared.
memory  what three steps with AdamW add at their peak to the loaded model, each kind in a process of
        its own.

--json keeps what the file has of other methods and parts, if it is of the same CPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import figures, method_plot, method_tables, operators
from benchmarks.methods import BARE, KINDS, LABELS, METHODS, NAMES, Method, Source
from benchmarks.own_process import in_own_process
from benchmarks.prefix_tuning import FOLDER, base_folder
from fusetune.bench.in_turn import in_turn
from fusetune.demo import model as models
from fusetune.demo.memory import PeakMeter
from fusetune.env import cpu_label

PARTS = ("calls", "time", "memory")
RATE = 1e-3


class Sizes(NamedTuple):
    """Of a batch."""

    batch: int
    tokens: int


class Steps:
    """Training steps of one kind, on random tokens, the same ones for all."""

    def __init__(self, method: Method, kind: str, source: Source, sizes: Sizes) -> None:
        self.method = method
        self.model = method.build(kind, source)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=0.0)
        self.sizes = sizes
        self.words = self.model.get_input_embeddings().num_embeddings

    def batch(self, number: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(self.words, self.sizes, generator=generator)
        classes = torch.randint(LABELS, self.sizes[:1], generator=generator)
        labels = classes if self.method.encoder else ids
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def loss(self, number: int) -> torch.Tensor:
        torch.manual_seed(number)  # of the dropouts
        loss: torch.Tensor = self.model(**self.batch(number)).loss
        return loss

    def __call__(self, number: int) -> float:
        loss = self.loss(number)
        loss.backward()
        return loss.item()

    @torch.no_grad()
    def loss_without_dropout(self, number: int) -> float:
        """In which fused and stock agree: the base model's masks are not the same ones."""
        self.model.eval()
        for layer in self.model.modules():
            # bitsandbytes, where the CPU has bf16: else it rounds to that, and repacks the weight.
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.train()
        loss = self.loss(number).item()
        self.model.train()
        return loss

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def take_over(self, other: Steps) -> None:
        """The parameters of another kind's, so that the next losses are of the same model."""
        for own, value in zip(self.trained, other.trained, strict=True):
            own.copy_(value)
        self.optimizer.zero_grad(set_to_none=True)


def calls_of_a_layer(method: Method, kind: str, source: Source, sizes: Sizes) -> dict[str, int]:
    """What one layer calls, forward and backward; kernels of ours are among the calls."""
    three, two = (_calls(method, kind, source._replace(layers=layers), sizes) for layers in (3, 2))
    return {name: three[name] - two[name] for name in three}


def _calls(method: Method, kind: str, source: Source, sizes: Sizes) -> dict[str, int]:
    steps = Steps(method, kind, source, sizes)
    with method.around(kind):
        steps(0)  # what is done once is not counted
        steps.optimizer.zero_grad(set_to_none=True)
        with operators.counted() as forward:
            loss = steps.loss(1)
        with operators.counted() as backward:
            loss.backward()
    return {
        "forward": forward.total(),
        "backward": backward.total(),
        "kernels": operators.kernels(forward + backward),
    }


def time_of_steps(method: Method, source: Source, sizes: Sizes, pairs: int) -> dict[str, Any]:
    steps = {kind: Steps(method, kind, source, sizes) for kind in KINDS}
    stock, fused = (steps[kind] for kind in KINDS)
    differences = []

    def update() -> None:
        stock.update()
        fused.take_over(stock)
        with method.around("stock"):
            want = stock.loss_without_dropout(len(differences))
        difference = fused.loss_without_dropout(len(differences)) - want
        differences.append(abs(difference) / abs(want))

    turns = in_turn(
        KINDS,
        lambda kind, number: steps[kind](number),
        pairs,
        around=method.around,
        after=update,
    )
    return {
        "step_s": {kind: turns.median(kind) for kind in KINDS},
        "speedup": turns.ratio("stock", "fused"),
        "loss_difference": max(differences),
        "pairs": pairs,
    }


def memory_of_steps(method: Method, source: Source, sizes: Sizes, threads: int) -> dict[str, Any]:
    peaks = {
        kind: in_own_process(peak, method.name, kind, source, sizes, threads) for kind in KINDS
    }
    return {} if None in peaks.values() else {"memory_mib": peaks}


def peak(name: str, kind: str, source: Source, sizes: Sizes, threads: int) -> float | None:
    """MiB that three steps add to this process; None where the system does not tell."""
    torch.set_num_threads(threads)
    models.quiet()
    method = next(method for method in METHODS if method.name == name)
    steps = Steps(method, kind, source, sizes)
    with PeakMeter(torch.device("cpu")) as meter, method.around(kind):
        for number in range(3):
            steps(number)
            steps.update()
    return None if meter.peak is None else meter.peak.extra


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    models.quiet()
    chosen = [NAMES[name] for name in options.methods]
    decoders = any(not method.encoder for method in chosen)
    source = Source(base_folder(options.base) if decoders else options.base, options.encoder)
    sizes = Sizes(options.batch, options.tokens)
    measures: dict[str, Callable[[Method], dict[str, Any]]] = {
        "calls": lambda method: {
            "calls": {kind: calls_of_a_layer(method, kind, source, sizes) for kind in KINDS}
        },
        "time": lambda method: time_of_steps(method, source, sizes, options.pairs),
        "memory": lambda method: memory_of_steps(method, source, sizes, options.threads),
    }
    found = figures.kept(options.json, {"rows": {}})
    found.update(cpu=cpu_label(), threads=options.threads, sizes=list(sizes))
    if "calls" in (options.part or PARTS):
        found["bare"] = {
            bare.model: calls_of_a_layer(bare, "stock", source, sizes)
            for bare in BARE
            if bare.model in {method.model for method in chosen}
        }
    for method in chosen:
        row = found["rows"].setdefault(method.name, {})
        row.update(model=method.model, against=method.against)
        for part in options.part or PARTS:
            row.update(measures[part](method))
            print(f"{method.name}: {part}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    found["rows"] = {m.name: found["rows"][m.name] for m in METHODS if m.name in found["rows"]}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.plot:
        method_plot.draw(found, options.plot)
    print(f"\n{method_tables.methods(found)}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_methods")
    parser.add_argument(
        "--methods", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME",
        help=f"of {', '.join(NAMES)}; default: all",
    )  # fmt: skip
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--pairs", type=int, default=7, help="of timed steps, for each method")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128, help="of each row of the batch")
    parser.add_argument("--base", type=Path, default=FOLDER, help="the decoder, made where missing")
    parser.add_argument("--encoder", type=Path, help="the encoder; default: the package's")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--plot", type=Path, help="draw them here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
