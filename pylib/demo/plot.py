"""One picture of a run: the losses, and stock against fused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

STOCK, FUSED, INK = "#9aa5b1", "#0b6e99", "#1f2933"
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
}


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes the PNG. `report` is what the demo writes as report.json."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, (loss, equal, speed, memory) = plt.subplots(
            1, 4, figsize=(13.5, 3.9), width_ratios=[2.2, 1.5, 1, 1.25], layout="constrained"
        )
        draw_training(loss, report["training"])
        draw_agreement(equal, report["comparison"])
        draw_speed(speed, report["comparison"])
        draw_memory(memory, report["comparison"])
        setup = report["setup"]
        layout: Any = figure.get_layout_engine()
        layout.set(wspace=0.06)
        figure.suptitle(
            f"QLoRA fine-tune of {setup['model']} · {setup['device']} · "
            f"{setup['batch_size']} × {setup['seq_len']} tokens a step",
            fontsize=12,
            x=0.01,
            ha="left",
        )
        figure.savefig(path, dpi=110)
        plt.close(figure)


def draw_training(axes: Any, training: dict[str, Any]) -> None:
    losses = training["losses"]
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color=STOCK, linewidth=1, label="training, each step")
    axes.plot(steps, running_mean(losses, 8), color=FUSED, linewidth=2, label="training, mean of 8")
    before, after = training["eval_loss_before"], training["eval_loss_after"]
    axes.plot([0, len(losses)], [before, after], "o", color="#d64545", label="held-out text")
    for x, y, side in ((0, before, "left"), (len(losses), after, "right")):
        axes.annotate(f"{y:.2f}", (x, y), (0, 7), textcoords="offset points", ha=side)
    axes.set(title="Training, fused", xlabel="step", ylabel="loss", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, loc="lower left", fontsize=9)


def running_mean(values: list[float], window: int) -> list[float]:
    spans = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [sum(span) / len(span) for span in spans]


def draw_agreement(axes: Any, comparison: dict[str, Any]) -> None:
    stock, fused = comparison["losses"]["stock"], comparison["losses"]["fused"]
    steps = range(1, len(stock) + 1)
    axes.plot(steps, stock, "o-", color=STOCK, linewidth=5, markersize=10, label="stock")
    axes.plot(steps, fused, "o-", color=FUSED, linewidth=1.5, markersize=4, label="fused")
    axes.set(
        title="Same losses",
        xlabel=f"step (they differ by {comparison['loss_difference']:.0e})",
        ylim=(0, None),
    )
    axes.set_xticks(list(steps))
    axes.legend(frameon=False, loc="lower left", fontsize=9)


def draw_speed(axes: Any, comparison: dict[str, Any]) -> None:
    values = [comparison[v]["tokens_per_s"] for v in ("stock", "fused")]
    bars = axes.bar(["stock", "fused"], values, color=[STOCK, FUSED], width=0.65)
    axes.bar_label(bars, [f"{v:,.0f}" for v in values], padding=2)
    axes.set(title=f"Tokens/s: {comparison['speedup']:.2f}×", yticks=[])
    axes.margins(y=0.12)
    axes.spines["left"].set_visible(False)


def draw_memory(axes: Any, comparison: dict[str, Any]) -> None:
    """Bars in two parts: what is resident between steps, and what the step adds at its peak."""
    if comparison["memory_saved"] is None:
        axes.set_axis_off()
        axes.set_title("Peak memory: not measurable here")
        return
    names = ("stock", "fused")
    total = [comparison[v]["peak_mib"] / 1024 for v in names]
    step = [comparison[v]["step_peak_mib"] / 1024 for v in names]
    rest = [t - s for t, s in zip(total, step, strict=True)]
    axes.bar(names, rest, color=[STOCK, FUSED], width=0.65, alpha=0.45)
    bars = axes.bar(names, step, bottom=rest, color=[STOCK, FUSED], width=0.65)
    axes.bar_label(bars, [f"{t:.2f} GiB" for t in total], padding=2)
    saved = comparison["memory_saved"]
    axes.set(title=f"Peak memory: {-saved:+.0%}", yticks=[])
    axes.margins(y=0.12)
    axes.set_xlabel("pale: held between steps")
    axes.spines["left"].set_visible(False)
