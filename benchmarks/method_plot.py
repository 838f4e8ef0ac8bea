"""The picture of what bench_methods measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusetune.demo.plot import FUSED, STOCK, STYLE

HEIGHT = 0.38  # of a bar; a method has two


def draw(found: dict[str, Any], path: Path) -> None:
    """Writes the PNG: step time, memory and calls of each method, stock above fused.

    `found` is what bench_methods writes; a panel has the methods of which its part was measured.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (
        ("Time of a step, ms", {n: _times(r) for n, r in found["rows"].items() if "step_s" in r}),
        ("Memory for it, MiB", _of(found["rows"], "memory_mib")),
        (
            "Calls of a layer, both passes",
            {name: _sums(calls) for name, calls in _of(found["rows"], "calls").items()},
        ),
    )
    batch, tokens = found["sizes"]
    with plt.rc_context(STYLE):
        size = (13.5, 1.2 + 0.42 * len(found["rows"]))
        figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained")
        for one, (title, values) in zip(axes, panels, strict=True):
            _pairs(one, values)
            one.set(title=title)
        figure.suptitle(
            f"Methods, stock and fused · {found['cpu']}, {found['threads']} threads · "
            f"{batch} × {tokens} tokens",
            fontsize=12,
            x=0.01,
            ha="left",
        )
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _of(rows: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: row[key] for name, row in rows.items() if key in row}


def _times(row: dict[str, Any]) -> dict[str, Any]:
    """In ms; the ratio is that of pairs, not of the medians."""
    seconds = {kind: 1000 * value for kind, value in row["step_s"].items()}
    return {**seconds, "label": f"{row['speedup']:.2f}×"}


def _sums(calls: dict[str, Any]) -> dict[str, int]:
    return {kind: calls[kind]["forward"] + calls[kind]["backward"] for kind in ("stock", "fused")}


def _pairs(axes: Any, values: dict[str, Any]) -> None:
    """Two bars of each method; models differ in size, hence the logarithm."""
    places = range(len(values))
    for kind, color, shift in (("stock", STOCK, -HEIGHT / 2), ("fused", FUSED, HEIGHT / 2)):
        lengths = [pair[kind] for pair in values.values()]
        bars = axes.barh([p + shift for p in places], lengths, HEIGHT, color=color, label=kind)
        if kind == "fused":
            axes.bar_label(bars, [_label(pair) for pair in values.values()], padding=3, fontsize=9)
    axes.set_yticks(list(places), list(values))
    axes.invert_yaxis()
    if values:
        axes.set_xscale("log")
        axes.margins(x=0.12)
        axes.legend(frameon=False, fontsize=9)


def _label(pair: dict[str, Any]) -> str:
    if "label" in pair:
        return str(pair["label"])
    return f"{pair['fused'] / pair['stock'] - 1:+.0%}" if pair["stock"] else ""
