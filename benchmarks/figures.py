"""What measurements of training steps and layers share: options, and the file of their figures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from fusetune.demo import model as models
from fusetune.env import cpu_label


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, --threads and --json among them; sets that many threads, and says on what."""
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models.quiet()
    print(f"{cpu_label()}, {options.threads} threads", flush=True)
    return options


def kept(path: Path | None, empty: dict[str, Any]) -> dict[str, Any]:
    """What the file has of earlier calls, or `empty`.

    Exits where that was measured on another machine: one file is one table, with one heading.
    """
    if path is None or not path.exists():
        return empty
    found: dict[str, Any] = json.loads(path.read_text())
    if found["cpu"] != cpu_label():
        raise SystemExit(
            f"--json: {path} has figures of {found['cpu']}, and this is {cpu_label()}; "
            "name another file, or remove that one"
        )
    return found


def write(options: argparse.Namespace, rows: Any, **setting: Any) -> None:
    """The rows, and what they were measured on, into the file of --json, where that was given."""
    if options.json is None:
        return
    found = {"cpu": cpu_label(), "threads": options.threads, **setting, "rows": rows}
    options.json.write_text(json.dumps(found, indent=1) + "\n")
