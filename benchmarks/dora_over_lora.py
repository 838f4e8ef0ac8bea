"""What a DoRA layer takes beside a LoRA layer of the same sizes, both fused: forward and backward.

    python -m benchmarks.dora_over_lora
    python -m benchmarks.dora_over_lora --json out.json

The two take turns; the ratio is the median over pairs. The gradients are those of x, lora_A, lora_B
and, for DoRA, the magnitude. With dropout DoRA, as PEFT defines it, makes the base product twice.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import figures
from fusetune import ops
from fusetune.bench.in_turn import calls_in_turn

RANK, SCALING = 16, 2.0


def steps(m: int, n: int, dense: bool, dropout: float) -> dict[str, Callable[[], Any]]:
    """A step of each kind over the same weight [n, n] and rows [m, n]."""
    torch.manual_seed(0)
    w = torch.randn(n, n) / n**0.5
    weight = w if dense else ops.quantize_4bit(w, double_quant=True)
    x, dy = torch.randn(m, n, requires_grad=True), torch.randn(m, n)
    a, b = torch.randn(RANK, n) / n**0.5, torch.randn(n, RANK)
    magnitude = ops.dora_norm(weight, a, b, SCALING) * (torch.rand(n) + 0.5)
    leaves = [x, *(t.requires_grad_() for t in (a, b, magnitude))]
    options = {"dropout_p": dropout}

    def lora() -> Any:
        y = ops.lora_linear(x, weight, a, b, SCALING, **options)
        return torch.autograd.grad(y, leaves[:3], dy)

    def dora() -> Any:
        y = ops.dora_linear(x, weight, a, b, SCALING, magnitude, **options)
        return torch.autograd.grad(y, leaves, dy)

    return {"lora": lora, "dora": dora}


def compare(runs: dict[str, Callable[[], Any]], pairs: int) -> dict[str, float]:
    """Median milliseconds of each, and of the pairs' ratios."""
    turns = calls_in_turn(runs, pairs)
    row = {f"{kind}_ms": 1e3 * turns.median(kind) for kind in runs}
    return {**row, "ratio": turns.ratio("dora", "lora")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--pairs", type=int, default=9)
    options = figures.parsed(parser)
    rows = []
    for n in options.sizes:
        for dense in (True, False):
            for m in options.rows:
                for dropout in (0.0, 0.05):
                    found = compare(steps(m, n, dense, dropout), options.pairs)
                    kind = "dense" if dense else "NF4"
                    rows.append({"m": m, "n": n, "weight": kind, "dropout": dropout, **found})
                    print(
                        f"{m} x {n} x {n} {kind}, dropout {dropout:g}: LoRA {found['lora_ms']:.1f} "
                        f"ms, DoRA {found['dora_ms']:.1f} ms, {found['ratio']:.2f} of LoRA's time",
                        flush=True,
                    )
    figures.write(options, rows, rank=RANK)


if __name__ == "__main__":
    main()
