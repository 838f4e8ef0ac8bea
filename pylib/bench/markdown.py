"""Rows of measurements as a table in Markdown, which also reads well in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line a row, ours in ms, then how many times longer each peer takes."""
    peers = list(dict.fromkeys(name for row in rows for name in row["ratio"]))
    with_peak = any(row["peak_share"] is not None for row in rows)
    head = ["case", "size", "ms", *(f"{name} takes" for name in peers)]
    head += (["of FMA peak"] if with_peak else []) + ["error"]
    body = []
    for row in rows:
        line = [row["name"], row["shape"], f"{row['ms']:.3g}"]
        line += [ratio(row["ratio"].get(name)) for name in peers]
        if with_peak:
            line.append("" if row["peak_share"] is None else f"{row['peak_share']:.0%}")
        body.append([*line, f"{row['error']:.0e}" if row["error"] else "0"])
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]

    def text(line: list[str]) -> str:
        first, rest = line[:2], line[2:]
        cells = [c.ljust(w) for c, w in zip(first, widths[:2], strict=True)]
        cells += [c.rjust(w) for c, w in zip(rest, widths[2:], strict=True)]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * w for w in widths[:2]] + ["-" * (w - 1) + ":" for w in widths[2:]]
    return "\n".join([text(head), text(rule), *(text(line) for line in body)])


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}×" if value < 10 else f"{value:.1f}×"
