"""Table and picture of what glue_of_methods measured; `report` is what it writes as JSON."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fusetune.demo.plot import FUSED, INK, STYLE

from .adapters_report import markdown, standard_error

# PEFT's names of an encoder layer's matrices, and what they are called here.
MATRICES = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention's output",
    "intermediate.dense": "feed-forward, up",
    "output.dense": "feed-forward, down",
}


def table(report: dict[str, Any]) -> str:
    """In Markdown, with what it was measured on, and what has to be known to read it."""
    setting = report["setting"]
    rows = []
    for name, row in report["rows"].items():
        cost = report["cost"].get(name, {})
        step, memory = cost.get("step_s"), cost.get("memory_mib")
        edge = "\\*" if at_the_edge(report["rates"].get(name, {}), row["rate"]) else ""
        rows.append(
            (
                name,
                f"{row['accuracy']:.1%}",
                f"{row['parameters']:,}",
                f"{row['rate']:g}{edge}" if row["parameters"] else "",
                "" if step is None else f"{1000 * step:.0f} ms",
                "" if memory is None else f"{memory:.0f} MiB",
            )
        )
    headers = ("method", "accuracy", "parameters trained", "rate", "step", "memory for it")
    parts = [
        f"{setting['labels']} labels; {setting['train']:,} glosses to train on, "
        f"{setting['steps']} steps of {setting['batch']}; {setting['held_out']:,} held out "
        f"(chance {1 / setting['labels']:.1%}, a standard error is "
        f"{standard_error(setting):.1%}). Each learning rate is the best of three after "
        f"{setting['trial_steps']} steps, by the loss on {setting['validation']} glosses held "
        "apart from those it trained on; \\*: the last or first of the three, so that a better "
        "one may lie beyond:",
        markdown(rows, headers),
        _budget(report["rows"]),
        f"On {setting['cpu']}, {setting['threads']} threads." if report["cost"] else "",
    ]
    return "\n\n".join(part for part in parts if part)


def at_the_edge(trials: dict[str, float], rate: float) -> bool:
    """Whether a rate is the least or the greatest that was tried."""
    rates = [float(tried) for tried in trials]
    return bool(rates) and rate in (min(rates), max(rates))


def _budget(rows: dict[str, Any]) -> str:
    kept = rows.get("AdaLoRA", {}).get("ranks")
    if not kept:
        return ""
    values = kept.values()
    return (
        f"AdaLoRA's budget: {sum(values)} ranks over {len(kept)} matrices, from {min(values)} to "
        f"{max(values)} each."
    )


def rank_map(kept: dict[str, int]) -> tuple[list[str], list[list[int | None]]]:
    """(names of matrices, their ranks by layer); None where a layer lacks the adapter."""
    found: dict[str, dict[int, int]] = {}
    for name, rank in kept.items():
        layer, matrix = re.search(r"layer\.(\d+)\.(.+)$", name).groups()  # type: ignore[union-attr]
        found.setdefault(MATRICES[matrix], {})[int(layer)] = rank
    layers = 1 + max(layer for ranks in found.values() for layer in ranks)
    names = [name for name in MATRICES.values() if name in found]
    return names, [[found[name].get(layer) for layer in range(layers)] for name in names]


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes the PNG, if a method was measured: accuracies, and where AdaLoRA's ranks went."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = report["rows"]
    if not rows:
        return
    kept = rows.get("AdaLoRA", {}).get("ranks")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1,
            2 if kept else 1,
            figsize=(12.5 if kept else 7.5, 4.6),
            width_ratios=[1.5, 1] if kept else None,
            layout="constrained",
            squeeze=False,
        )
        _draw_accuracies(axes[0][0], rows, 100 * standard_error(report["setting"]))
        if kept:
            _draw_ranks(figure, axes[0][1], kept)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _draw_accuracies(axes: Any, rows: dict[str, Any], spread: float) -> None:
    """Bars, the best on top; their labels: how many parameters were trained."""
    names = sorted(rows, key=lambda name: rows[name]["accuracy"])
    values = [100 * rows[name]["accuracy"] for name in names]
    bars = axes.barh(names, values, xerr=spread, color=FUSED, ecolor=INK, error_kw={"capsize": 2})
    axes.bar_label(bars, [f"{rows[n]['parameters']:,}" for n in names], padding=4, fontsize=9)
    axes.margins(x=0.15, y=0.01)
    axes.set(
        title="Held-out accuracy; parameters trained",
        xlabel="%, with a standard error",
    )


def _draw_ranks(figure: Any, axes: Any, kept: dict[str, int]) -> None:
    names, ranks = rank_map(kept)
    cells = [[float("nan") if rank is None else rank for rank in row] for row in ranks]
    image = axes.imshow(cells, cmap="Blues", vmin=0, aspect="auto")
    middle = max(kept.values()) / 2
    for at, row in enumerate(ranks):
        for layer, rank in enumerate(row):
            if rank is not None:
                color = "white" if rank > middle else INK
                axes.text(layer, at, str(rank), ha="center", va="center", color=color)
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(len(ranks[0])), range(1, 1 + len(ranks[0])))
    axes.set(title="Where AdaLoRA's ranks went", xlabel="layer")
    figure.colorbar(image, ax=axes, label="rank", shrink=0.8)
