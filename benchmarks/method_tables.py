"""The README's tables of whole training steps: prefix_tuning.py and prompt_tuning.py."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

MEMORY = (("peak of the process", ""), ("added by the steps", ", steps alone"))


def prefix_tuning(found: dict[str, Any]) -> str:
    """From what benchmarks.prefix_tuning writes; memory is in MiB."""
    rows = []
    for tokens, row in found["rows"].items():
        rows.append(
            (
                f"P={tokens}: time",
                f"{row['stock_s']:.2f} s",
                f"{row['fused_s']:.2f} s ({row['speedup']:.2f}×)",
                "",
            )
        )
        rows += [_memory(f"P={tokens}: {what}", row, part) for what, part in MEMORY]
        rows.append((f"P={tokens}: losses differ by", "", f"{row['loss_difference']:.0e}", ""))
    return _table(found, ("a step", "stock", "fused", "fused, checkpointing"), rows)


def prompt_tuning(found: dict[str, Any]) -> str:
    """From what benchmarks.prompt_tuning writes."""
    rows = [
        (name, f"{row['step_s']:.2f} s", f"{row['to_as_many_positions']:.3f}")
        for name, row in found["rows"].items()
    ]
    return _table(found, ("", "step", "to as many positions"), rows)


def _memory(name: str, row: dict[str, float], part: str) -> tuple[str, ...]:
    stock = row["stock" + part]
    others = (row[kind + part] for kind in ("fused", "fused, checkpointing"))
    return name, f"{stock:.0f} MiB", *(f"{m:.0f} MiB ({m / stock - 1:+.0%})" for m in others)


def _table(found: dict[str, Any], headers: tuple[str, ...], rows: list[Any]) -> str:
    align = ("left", *["right"] * (len(headers) - 1))
    table = tabulate(rows, headers, tablefmt="pipe", colalign=align, disable_numparse=True)
    return f"{found['cpu']}, {found['threads']} threads:\n\n{table}"
