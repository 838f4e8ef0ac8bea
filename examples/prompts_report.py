"""Table and picture of what prompts_smollm2 measured; `report` is what it writes as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tabulate import tabulate

from fusetune.demo.plot import FUSED, STOCK, STYLE, running_mean

SHALLOW, DEEP = ("prompt tuning", "P-tuning"), ("P-tuning v2", "prefix tuning")
COLORS = {
    "prompt tuning": "#c9a227",
    "P-tuning": "#d64545",
    "P-tuning v2": FUSED,
    "prefix tuning": "#3aa17e",
    "LoRA": STOCK,
}


def table(report: dict[str, Any]) -> str:
    """In Markdown, with what it was measured on and a verdict on depth."""
    setting = report["setting"]
    rows = []
    for name in ("frozen", *COLORS):
        row = report["rows"].get(name)
        if row is None:
            continue
        step, memory = row.get("step_s"), row.get("memory_mib")
        rows.append(
            (
                name,
                _with_range(row),
                f"{row['accuracy']:.1%}",
                f"{row['parameters']:,}",
                f"{row['saved']:,}" if "saved" in row else "",
                "" if step is None else f"{1000 * step:.0f} ms",
                "" if memory is None else f"{memory:.0f} MiB",
            )
        )
    headers = ("", "held-out loss", "right", "trained", "in the file", "step", "memory for it")
    align = ("left", *["right"] * (len(headers) - 1))
    text = tabulate(rows, headers, tablefmt="pipe", colalign=align, disable_numparse=True)
    parts = [
        f"{setting['labels']} categories; {setting['train']:,} glosses to train on, "
        f"{setting['steps']} steps of {setting['batch']}; {setting['held_out']} held out; "
        f"prompts of {setting['length']}. Means of {setting['seeds']} seeds; each learning rate is "
        "the best of three on further glosses:",
        text,
        verdict(report["rows"]),
        f"On {setting['cpu']}, {setting['threads']} threads.",
    ]
    return "\n\n".join(part for part in parts if part)


def _with_range(row: dict[str, Any]) -> str:
    seeds = row.get("loss_by_seed")
    if not seeds:
        return f"{row['loss']:.2f}"
    return f"{row['loss']:.2f} ({min(seeds):.2f} to {max(seeds):.2f})"


def verdict(rows: dict[str, Any]) -> str:
    """Whether deep prompts are ahead of shallow ones of their length; "" while some are missing.

    Ahead: with every seed, of all the others' seeds.
    """
    if not all(name in rows for name in (*SHALLOW, *DEEP)):
        return ""
    shallow = min(loss for name in SHALLOW for loss in rows[name]["loss_by_seed"])
    worst = {name: max(rows[name]["loss_by_seed"]) for name in DEEP}
    ahead = [name for name in DEEP if worst[name] < shallow]
    if len(ahead) == len(DEEP):
        return (
            "Deep prompts are ahead of shallow ones: both, with every seed, of both shallow "
            f"ones (worst deep {max(worst.values()):.2f}, best shallow {shallow:.2f})."
        )
    if ahead:
        return (
            f"One deep prompt is ahead of the shallow ones with every seed, {ahead[0]} (worst "
            f"{worst[ahead[0]]:.2f}, best shallow {shallow:.2f}); the other is not."
        )
    return (
        f"Deep prompts are not ahead of shallow ones here: worst of each deep one "
        f"{', '.join(f'{loss:.2f}' for loss in worst.values())}, best shallow {shallow:.2f}."
    )


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes the PNG, if there is a method to be drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {name: report["rows"][name] for name in COLORS if name in report["rows"]}
    if not rows:
        return
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9.6, 3.9), width_ratios=[1.5, 1], layout="constrained"
        )
        for name, row in rows.items():
            losses = row["losses"]
            steps = range(1, len(losses) + 1)
            left.plot(steps, running_mean(losses, 8), color=COLORS[name], label=name)
        left.set(
            title="Training, mean of 8 steps and all seeds",
            xlabel="step",
            ylabel="loss",
            ylim=(0, None),
        )
        left.legend(frameon=False, fontsize=9)
        names = list(rows)
        bars = right.barh(names, [rows[n]["loss"] for n in names], color=[COLORS[n] for n in names])
        right.bar_label(bars, fmt="%.2f", padding=3)
        right.invert_yaxis()
        right.margins(x=0.15)
        right.set(title="Held-out loss")
        figure.savefig(path, dpi=110)
        plt.close(figure)
