"""Tables and picture of what adapters_minilm measured; `report` is what it writes as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tabulate import tabulate

from fusetune.demo.plot import FUSED, STOCK, STYLE

GREY, BLUE, RED = STOCK, FUSED, "#d64545"


def tables(report: dict[str, Any]) -> str:
    """All parts that are there, in Markdown."""
    parts = []
    if "methods" in report:
        parts.append(_methods(report["methods"], report.get("cost", {})))
        if "cost" in report:
            parts.append(f"Steps on {report['cpu']}, {report['threads']} threads.")
    if "fusion" in report:
        parts.append(_fusion(report["fusion"]))
    if "madx" in report:
        parts.append(_madx(report["madx"]))
    return "\n\n".join(parts)


def _methods(part: dict[str, Any], costs: dict[str, Any]) -> str:
    rows = []
    for name, row in part["rows"].items():
        cost = costs.get(name, {})
        step, memory = cost.get("step_s"), cost.get("memory_mib")
        rows.append(
            (
                name,
                f"{row['accuracy']:.1%}",
                f"{row['parameters']:,}",
                "" if step is None else f"{1000 * step:.0f} ms",
                "" if memory is None else f"{memory:.0f} MiB",
            )
        )
    text = (
        f"{part['labels']} labels; {part['train']:,} glosses to train on, {part['steps']} steps of "
        f"{part['batch']}; {part['held_out']:,} held out (chance {1 / part['labels']:.1%}, "
        f"a standard error is {standard_error(part):.1%}):\n\n"
    )
    headers = ("method", "accuracy", "parameters trained", "step", "memory for it")
    return text + markdown(rows, headers)


def standard_error(part: dict[str, Any]) -> float:
    """Standard error of an accuracy about one half, the largest there is."""
    return float(0.5 / part["held_out"] ** 0.5)


def _fusion(part: dict[str, Any]) -> str:
    rows = [(name, f"{accuracy:.1%}") for name, accuracy in part["accuracy"].items()]
    text = f"All {part['labels']} labels from {part['texts']} glosses:\n\n"
    return text + markdown(rows, ("on the encoder", "accuracy"))


def _madx(part: dict[str, Any]) -> str:
    rows = [(row["text"], row["language"], f"{row['accuracy']:.1%}") for row in part["rows"]]
    text = (
        f"The task was learnt in alphabet A alone; {part['held_out']} held-out texts, "
        f"chance {part['chance']:.0%}:\n\n"
    )
    return text + markdown(rows, ("text in", "stacked under the task", "accuracy"))


def markdown(rows: list[tuple[str, ...]], headers: tuple[str, ...]) -> str:
    align = ("left", *["right"] * (len(headers) - 1))
    return tabulate(rows, headers, tablefmt="pipe", colalign=align, disable_numparse=True)


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes the PNG, if there is a part to be drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawers = {"methods": _draw_methods, "fusion": _draw_fusion, "madx": _draw_madx}
    names = [name for name in drawers if name in report]
    if not names:
        return
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(names), figsize=(4.6 * len(names), 3.9), layout="constrained", squeeze=False
        )
        for one, name in zip(axes[0], names, strict=True):
            drawers[name](one, report[name])
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _draw_methods(axes: Any, part: dict[str, Any]) -> None:
    for name, row in part["rows"].items():
        trained = row["parameters"] + row["head_parameters"]
        spread = 100 * standard_error(part)
        axes.errorbar(trained, 100 * row["accuracy"], spread, fmt="o", capsize=2, label=name)
    axes.legend(frameon=False, loc="lower right")
    axes.set(
        title="Methods on the real encoder",
        xlabel="parameters trained, with the head",
        ylabel="held-out accuracy, %",
        xscale="log",
    )


def _draw_fusion(axes: Any, part: dict[str, Any]) -> None:
    _bars(axes, list(part["accuracy"].items()), "fusion of the three")
    axes.set(title="A task with few texts", xlabel="held-out accuracy, %")


def _draw_madx(axes: Any, part: dict[str, Any]) -> None:
    bars = [(f"{row['text']} under {row['language']}", row["accuracy"]) for row in part["rows"]]
    _bars(axes, bars, "B under language B")
    axes.axvline(100 * part["chance"], color=RED, linestyle="--", linewidth=1)
    axes.set(title="The task has never seen alphabet B", xlabel="held-out accuracy, %")


def _bars(axes: Any, bars: list[tuple[str, float]], ours: str) -> None:
    names = [name for name, _ in bars]
    values = [100 * value for _, value in bars]
    drawn = axes.barh(names, values, color=[BLUE if name == ours else GREY for name in names])
    axes.bar_label(drawn, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
