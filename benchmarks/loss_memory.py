"""Peak memory that a loss over a vocabulary and its gradient add: with all logits, and by blocks.

    python -m benchmarks.loss_memory [--json benchmarks/results/loss-memory.json]

SmolLM2's last layer, fp32, on the CPU, forward and backward. x and the weight are there before; dx,
the logits and all that is computed from them are what is counted. Each figure is of a process of
its own, the median of a few runs; the first is not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks import method_tables
from benchmarks.memory import median_peak
from benchmarks.own_process import in_own_process
from fusetune.bench.loss_cases import linear_cross_entropy
from fusetune.demo.memory import MIB
from fusetune.env import cpu_label

ROWS, FEATURES, CLASSES = (512, 2048, 8192), 576, 49152
OURS = "ours, by blocks"
WAYS = ("torch", "ours with logits", OURS)


def extra(rows: int, way: str) -> float | None:
    """MiB at the peak; None where the system does not tell."""
    torch.manual_seed(0)
    case = linear_cross_entropy(rows, FEATURES, CLASSES, torch.float32)
    return median_peak(case.ours if way == OURS else case.peers[way])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss_memory")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    rows = []
    for m in ROWS:
        added = {way: in_own_process(extra, m, way) for way in WAYS}
        if None in added.values():
            print("peak memory cannot be read here: /proc/self/clear_refs", file=sys.stderr)
            return 1
        logits = 4 * m * CLASSES / MIB
        rows.append({"shape": f"{m} × {FEATURES} → {CLASSES}", "logits": logits, "added": added})
    figures = {"cpu": cpu_label(), "threads": torch.get_num_threads(), "rows": rows}
    print(method_tables.loss_memory(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
