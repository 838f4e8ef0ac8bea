"""What the GPU kernels need and move, against what was recorded in tests/compile/budgets.json.

    python -m benchmarks.budgets             a table of all; exit code 1 where a budget is broken
    python -m benchmarks.budgets --update    records what was found: a change to be reviewed

Compiled for every architecture: no spills, no stack, shared memory that the device has, the
instructions that a kernel is written for, registers within 8 of the record. Executed by the
simulator at a fixed shape: sectors of global memory, wavefronts of shared memory and floating point
operations of matrix instructions, all exactly as recorded.

Where a case says what is compulsory, two more figures, as multiples of it. `executed`: all that
warps load and store. `memory`: what of it passes through a cache of L2's size, which holds at first
nothing. Within the case's limit for the cache of an A100; for a small one as recorded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from tabulate import tabulate

from benchmarks.budgets_found import PARTS, ROOT, Found, toolchain
from fusetune.sim.triton_driver import MAX_SHARED

RECORD = ROOT / "tests" / "compile" / "budgets.json"

BAND = 8  # registers


class Row(NamedTuple):
    """One number of one kernel. verdict: empty where it is within its budget."""

    kernel: str
    what: str
    recorded: Any
    found: Any
    verdict: str = ""


def compare(recorded: Found, found: Found) -> list[Row]:
    """Every number of every kernel, in the order of `found`."""
    rows = []
    for kernel, numbers in found.items():
        if kernel not in recorded:
            rows.append(Row(kernel, "", None, None, "not recorded"))
            continue
        before = recorded[kernel]
        rows += [
            Row(kernel, k, before.get(k), v, _verdict(kernel, k, before.get(k), v))
            for k, v in numbers.items()
        ]
    gone = [
        Row(kernel, "", None, None, "recorded, but not found")
        for kernel in recorded
        if kernel not in found
    ]
    return rows + gone


def _verdict(kernel: str, what: str, recorded: Any, found: Any) -> str:
    if what in ("stack", "spills"):
        return "must be 0" if found else ""
    if what == "beyond":
        return str(found)
    if what == "missing":
        return f"no {' and no '.join(found)}" if found else ""
    if what == "shared":
        arch = int(kernel.removeprefix("sm_").split(",")[0])
        return f"more than the device's {MAX_SHARED[arch]}" if found > MAX_SHARED[arch] else ""
    if what == "registers":
        off = recorded is None or abs(found - recorded) > BAND
        return f"further than {BAND} from the record" if off else ""
    if found == recorded:
        return ""
    return (
        "more than recorded" if recorded is None or found > recorded else "less: update the record"
    )


def broken(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.verdict]


def table(rows: Iterable[Row]) -> str:
    return str(tabulate(rows, headers=["kernel", "", "recorded", "found", "verdict"]))


_NOT_RECORDED = ("stack", "spills", "missing", "beyond")


def record(parts: dict[str, Found]) -> str:
    """The file: a line for each kernel. What is always zero or empty is left out."""
    lines = [f' "toolchain": {json.dumps(toolchain())}']
    for part, found in parts.items():
        kept = {
            kernel: {k: v for k, v in numbers.items() if k not in _NOT_RECORDED}
            for kernel, numbers in sorted(found.items())
        }
        body = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in kept.items())
        lines.append(f' "{part}": {{\n{body}\n }}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.budgets")
    parser.add_argument("--update", action="store_true")
    options = parser.parse_args()
    parts = {name: find() for name, find in PARTS.items()}
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    rows = [row for name, found in parts.items() for row in compare(recorded.get(name, {}), found)]
    if options.update:
        # What no record can allow is not recorded either.
        never = [row for row in broken(rows) if row.what in (*_NOT_RECORDED, "shared")]
        print(table(broken(rows)))
        if never:
            print("\nnothing is recorded: these are not a matter of a record\n\n" + table(never))
            return 1
        RECORD.write_text(record(parts))
        return 0
    print(table(rows))
    return 1 if broken(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
