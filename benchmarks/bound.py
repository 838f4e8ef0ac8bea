"""How fast the GPU kernels can be at best, predicted from what they do; nothing here is measured.

    python -m benchmarks.bound                   every launch on every card, and the sums
    python -m benchmarks.bound --markdown        the README's tables
    python -m benchmarks.bound --json PATH       the numbers: benchmarks/results/predicted.json
    python -m benchmarks.bound --rows            up to how many rows to multiply with the packed W

One linear layer, 4096 x 4096 in NF4 with nested statistics, r = 16, 16-bit activations and adapter;
bottleneck adapters, their fusion and prefixes, at the sizes of ledgers_adapters.py; and a model's
norms, rotary embedding and loss, at those of ledgers_model.py.
A launch takes at least as long as each resource it uses: memory, tensor cores, fp32 units, L1,
shared memory, shuffles, special functions, issue slots. The longest is its bound; a pass is the sum
of its launches. Left out: latencies, gaps between launches, what the L2 cache keeps from one launch
to the next, clocks below the data sheet's. PTX instructions without moves stand for the machine's:
issue slots are an estimate. Counts of kernels with matrix products are those of sm_80's
instructions; on H100 and B200, where Triton takes others, their shared memory and the issue of
these instructions are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate

from benchmarks import bound_adapters, bound_model
from benchmarks.bound_launch import Bound, apart, bound, described, least_time, ledger, total
from benchmarks.cards import CARDS, Card
from benchmarks.gpu_launches import DROPOUT, RANK, weight
from benchmarks.ledgers import SCHEMES, Layer, decode_and_multiply
from benchmarks.ledgers_model import PARTS
from benchmarks.recorder import recorded
from fusetune import ops
from fusetune.ops import _cuda
from fusetune.ops._gpu_choice import use_way

SIZE = 4096
ROWS = 4096
FEW_ROWS = (1, 16, 64, 256)
MORE_ROWS = (64, 128, 256, 512, 1024, 4096)


def step(card: Card, rows: int, dropout_p: float = 0.0, size: int = SIZE) -> list[Bound]:
    """lora_linear over a 4-bit weight, forward and backward."""
    like: dict[str, Any] = {"dtype": card.dtype}
    w = weight(size, size)
    x, a, b = (torch.empty(shape, **like) for shape in ((rows, size), (RANK, size), (size, RANK)))
    dy = torch.empty(rows, size, **like)
    with recorded(card) as works:
        leaves = [t.requires_grad_() for t in (x, a, b)]
        y = ops.lora_linear(leaves[0], w, leaves[1], leaves[2], scaling=2.0, dropout_p=dropout_p)
        y.backward(dy)
    return [bound(work, card) for work in works]


def linear(card: Card, rows: int, size: int = SIZE) -> list[Bound]:
    """linear_4bit, forward and dX."""
    x = torch.empty(rows, size, dtype=card.dtype).requires_grad_()
    dy = torch.empty(rows, size, dtype=card.dtype)
    w = weight(size, size)
    with recorded(card) as works:
        ops.linear_4bit(x, w).backward(dy)
    return [bound(work, card) for work in works]


# --- for how many rows the kernels over the packed weight are used --------------------------------


def by_rows(card: Card, rows: int, size: int = SIZE) -> dict[str, list[Bound]]:
    """linear_4bit, forward and dX: straight from the packed weight, and decoded first."""
    found = {}
    for way in ("cuda", "addmm"):
        with use_way(way), mock.patch.object(_cuda, "max_rows", return_value=rows):
            found[way] = linear(card, rows, size)
    return found


def rows_table(chosen: Iterable[Card], form: str = "simple") -> str:
    """Microseconds at least, and within brackets where a kernel's two longest resources add up."""
    rows = []
    for card in chosen:
        row: list[str] = [card.name, str(_cuda.max_rows(card.arch, card.dtype))]
        for m in MORE_ROWS:
            print(f"{card.name}: M {m}", file=sys.stderr)
            packed, decoded = by_rows(card, m).values()
            least, most = total(packed)[1], apart(packed)
            row.append(f"{1e6 * least:.0f} ({1e6 * most:.0f}) : {1e6 * total(decoded)[1]:.0f}")
        rows.append(row)
    headers = ["packed : decoded", "limit", *(f"M = {m}" for m in MORE_ROWS)]
    return str(tabulate(rows, headers=headers, tablefmt=form, disable_numparse=True))


# --- results --------------------------------------------------------------------------------------


def predict(chosen: Iterable[Card]) -> dict[str, Any]:
    """Everything, as it is written to a file."""
    result: dict[str, Any] = {}
    layer = Layer(ROWS, SIZE, SIZE, RANK)
    for card in chosen:
        passes: dict[str, Any] = {}
        for p in (0.0, DROPOUT):
            print(f"{card.name}: M {ROWS}, dropout {p}", file=sys.stderr)
            passes[f"M {ROWS}, dropout {p}"] = {
                "launches": [described(b) for b in step(card, ROWS, p)],
                "others": {name: ledger(of(layer, p > 0), card) for name, of in SCHEMES.items()},
            }
        for rows in FEW_ROWS:
            print(f"{card.name}: M {rows}", file=sys.stderr)
            decoded = ledger(decode_and_multiply(Layer(rows, SIZE, SIZE, RANK)), card)
            passes[f"M {rows}"] = {
                "launches": [described(b) for b in linear(card, rows)],
                "others": {"decode and multiply": decoded},
            }
        passes |= bound_adapters.passes(card) | bound_model.passes(card)
        about = {key: value for key, value in card._asdict().items() if key != "dtype"}
        result[card.name] = {"card": {**about, "dtype": str(card.dtype)[6:]}, "passes": passes}
    return {"predicted": True, "layer": layer._asdict(), "cards": result}


def launches_table(result: dict[str, Any], form: str = "simple") -> str:
    """Every launch of every pass on every card."""
    rows = []
    for card, found in result["cards"].items():
        for name, one in found["passes"].items():
            for launch in one["launches"]:
                times = {k: 1e6 * v for k, v in launch["seconds"].items()}
                binds = launch["binds"]
                others = sorted(times, key=times.__getitem__, reverse=True)[1:3]
                rest = ", ".join(f"{o} {times[o]:.1f}" for o in others)
                megabytes = f"{launch['bytes'] / 1e6:.1f}"
                rows.append(
                    (card, name, launch["name"], megabytes, f"{times[binds]:.1f}", binds, rest)
                )
    headers = ["card", "pass", "launch", "MB", "µs at least", "bound by", "next"]
    return str(tabulate(rows, headers=headers, tablefmt=form, disable_numparse=True))


def steps_table(result: dict[str, Any], form: str = "simple") -> str:
    """Forward and backward of one QLoRA layer: MB, and µs at least, of every scheme."""
    rows = []
    for card, found in result["cards"].items():
        for name, one in found["passes"].items():
            if "PEFT + bitsandbytes" not in one["others"]:
                continue
            moved = sum(launch["bytes"] for launch in one["launches"])
            schemes = {
                "fusetune": {"bytes": moved, "seconds": sum(map(least_time, one["launches"]))}
            }
            schemes |= one["others"]
            row = [f"{card}, {name.partition(', ')[2]}"]
            row += [
                f"{s['bytes'] / 1e6:.0f} MB, {1e6 * s['seconds']:.0f} µs" for s in schemes.values()
            ]
            rows.append(row)
    headers = ["*predicted*", "fusetune", *SCHEMES]
    return str(tabulate(rows, headers=headers, tablefmt=form, disable_numparse=True))


def few_rows_table(result: dict[str, Any], form: str = "simple") -> str:
    """linear_4bit, forward and dX, for few rows; W decoded by bitsandbytes and then multiplied."""
    rows = []
    for card, found in result["cards"].items():
        row = [card]
        for m in FEW_ROWS:
            one = found["passes"][f"M {m}"]
            launches, decoded = one["launches"], one["others"]["decode and multiply"]
            longest = max(launches, key=least_time)
            moved = sum(launch["bytes"] for launch in launches) / 1e6
            took = 1e6 * sum(map(least_time, launches))
            row.append(f"{moved:.0f} MB, {took:.1f} µs, {longest['binds']}")
            row.append(f"{decoded['bytes'] / 1e6:.0f} MB, {1e6 * decoded['seconds']:.1f} µs")
        rows.append(row)
    columns = ((f"M = {m}", "decode and multiply") for m in FEW_ROWS)
    headers = ["*predicted*", *(name for pair in columns for name in pair)]
    return str(tabulate(rows, headers=headers, tablefmt=form, disable_numparse=True))


def markdown(result: dict[str, Any]) -> str:
    """The README's tables."""
    return (
        "LoRA on a layer of 4096 × 4096 in NF4, 4096 tokens, r = 16, forward and backward:\n\n"
        f"{steps_table(result, 'github')}\n\n"
        "NF4 without an adapter for M rows, forward and gradient:\n\n"
        f"{few_rows_table(result, 'github')}\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bound")
    parser.add_argument("--card", choices=[card.name for card in CARDS], action="append")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=Path, help="writes the numbers there")
    parser.add_argument("--rows", action="store_true", help="when to decode W first, by card")
    options = parser.parse_args()
    chosen = [card for card in CARDS if not options.card or card.name in options.card]
    if options.rows:
        print(f"Predicted, not measured: microseconds.\n\n{rows_table(chosen)}")
        return 0
    result = predict(chosen)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.markdown:
        parts = (bound_adapters.markdown(result), bound_model.markdown(result))
        print("\n".join([markdown(result), *parts]))
        return 0
    print("Predicted, not measured: bounds from counted work and data sheets.\n")
    print(f"{launches_table(result)}\n\n{steps_table(result)}\n\n{few_rows_table(result)}\n")
    print(bound_adapters.table(result))
    print(bound_adapters.table(result, layers=PARTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
