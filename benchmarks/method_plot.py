"""The picture of what bench_methods measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusetune.demo.plot import FUSED, STOCK, STYLE


def draw(found: dict[str, Any], path: Path) -> None:
    """Writes the PNG: step time, memory and calls of each method, as shares of stock's.

    `found` is what bench_methods writes; a panel has the methods of which its part was measured.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = found["rows"]
    panels = {
        # The ratio of the pairs, not of the medians.
        "Time of a step": {
            name: (1 / row["speedup"], _label(row["step_s"], 1000, "ms"))
            for name, row in rows.items()
            if "step_s" in row
        },
        "Memory for it": {
            name: _share(row["memory_mib"], "MiB")
            for name, row in rows.items()
            if "memory_mib" in row
        },
        "Calls of a layer, both passes": {
            name: _share(_sums(row["calls"]), "") for name, row in rows.items() if "calls" in row
        },
    }
    batch, tokens = found["sizes"]
    with plt.rc_context(STYLE):
        size = (13.5, 1.2 + 0.28 * len(rows))
        figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained")
        for one, (title, values) in zip(axes, panels.items(), strict=True):
            one.set(title=title, xlabel="fused, % of stock")
            _bars(one, values)
        figure.suptitle(
            f"{found['cpu']}, {found['threads']} threads · {batch} × {tokens} tokens a step",
            fontsize=12,
            x=0.01,
            ha="left",
        )
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _sums(calls: dict[str, Any]) -> dict[str, float]:
    return {kind: calls[kind]["forward"] + calls[kind]["backward"] for kind in ("stock", "fused")}


def _share(values: dict[str, float], unit: str) -> tuple[float, str]:
    return values["fused"] / values["stock"], _label(values, 1, unit)


def _label(values: dict[str, float], factor: float, unit: str) -> str:
    stock, fused = (f"{factor * values[kind]:.0f}" for kind in ("stock", "fused"))
    return f"{stock} → {fused} {unit}".rstrip()


def _bars(axes: Any, values: dict[str, tuple[float, str]]) -> None:
    if not values:
        axes.set_axis_off()
        return
    shares = [100 * share for share, _ in values.values()]
    bars = axes.barh(list(values), shares, color=FUSED)
    labels = [label for _, label in values.values()]
    axes.bar_label(bars, labels, label_type="center", color="white", fontsize=9)
    axes.axvline(100, color=STOCK, linestyle="--", linewidth=1.5, zorder=0)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08 * max(100, *shares))
