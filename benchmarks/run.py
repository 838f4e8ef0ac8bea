"""Measures ops against their peers and writes the results.

    python -m benchmarks.run --op linear_4bit            print, and update this machine's results
    python -m benchmarks.run --op lora_linear --json out.json
    python -m benchmarks.run --op bottleneck --threads 1 --adapters-python ENV/bin/python
    python -m benchmarks.run --all && python -m benchmarks.readme

Every case is first checked against float64: where a result is wrong nothing is timed, and the exit
code is 1. Ours and the peers then run in turn, so that they meet the same state of the machine.
"""

import argparse
import datetime
import json
import logging
import platform
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import figures
from benchmarks.peers import beside_adapters
from fusetune import env
from fusetune.bench import OPS, cases_of, measure, table

RESULTS = Path(__file__).parent / "results"
ADAPTERS_HELP = "Python of an environment with adapters==1.3.0: see peers/adapters_layers.py"
JSON_HELP = "default: benchmarks/results/<cpu and instruction set>.json"
LIBRARIES = ("fusetune", "torch", "bitsandbytes", "peft")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--op", choices=list(OPS))
    chosen.add_argument("--all", action="store_true")
    parser.add_argument("--json", type=Path, help=JSON_HELP)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each case")
    parser.add_argument("--short", action="store_true", help="a few cases only")
    parser.add_argument("--adapters-python", metavar="PATH", help=ADAPTERS_HELP)
    options = parser.parse_args()

    if options.adapters_python and options.threads != 1:
        parser.error("--adapters-python: that library is timed on one thread; give --threads 1")
    peer = beside_adapters.Adapters(options.adapters_python) if options.adapters_python else None
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    path = options.json or RESULTS / f"{slug(env.cpu_label())}.json"
    stored = figures.kept(path, {"ops": {}})
    for op in OPS if options.all else [options.op]:
        rows = []
        if op in beside_adapters.OPS and peer is None:
            print(f"{op}: not compared with adapters, see --adapters-python", file=sys.stderr)
        try:
            for case in cases_of(op, not options.short, options.size, options.size):
                rows.append(asdict(measure(case, options.seconds)))
                found = peer.compare(case, options.seconds) if peer is not None else None
                if found is not None:
                    rows[-1]["ratio"]["adapters"], rows[-1]["peer_ms"]["adapters"] = found
                print(f"{op} {case.name} {case.shape}", file=sys.stderr)
        except RuntimeError as error:
            print(f"wrong result, so nothing is reported: {error}", file=sys.stderr)
            return 1
        print(f"\n{op}, {env.cpu_label()}, {options.threads} threads\n\n{table(rows)}")
        stored["ops"][op] = result(options.threads, rows)
        save(path, stored)
    if peer is not None:
        peer.close()
    return 0


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def result(threads: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of one op."""
    return {
        "threads": threads,
        "rows": rows,
        "date": datetime.date.today().isoformat(),
        "versions": {name: env.information()["versions"][name] for name in LIBRARIES},
    }


def save(path: Path, stored: dict[str, Any]) -> None:
    stored["cpu"] = env.cpu_label()
    stored["system"] = platform.platform()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
