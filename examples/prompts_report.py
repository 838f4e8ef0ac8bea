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
                f"{row['loss']:.2f}",
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
        f"{setting['steps']} steps of {setting['batch']}; {setting['held_out']} held out; prompts "
        f"of {setting['length']}; one seed, learning rates from "
        "one to three trials on held-out glosses, prefix tuning's from a whole run:",
        text,
        verdict(report["rows"]),
        f"On {setting['cpu']}, {setting['threads']} threads.",
    ]
    return "\n\n".join(part for part in parts if part)


def verdict(rows: dict[str, Any]) -> str:
    """Whether deep prompts are ahead of shallow ones of their length; "" while some are missing."""
    if not all(name in rows for name in (*SHALLOW, *DEEP)):
        return ""
    best_shallow, best_deep = (
        min(names, key=lambda name: rows[name]["loss"]) for names in (SHALLOW, DEEP)
    )
    shallow, deep = rows[best_shallow]["loss"], rows[best_deep]["loss"]
    worst_deep = max(rows[name]["loss"] for name in DEEP)
    if worst_deep < shallow:
        return (
            f"Deep prompts are ahead of shallow ones: both have a lower loss than {best_shallow}, "
            f"the better of the two shallow ones ({best_deep} {deep:.2f}, {best_shallow} "
            f"{shallow:.2f})."
        )
    if deep < shallow:
        return (
            f"The best deep prompt is ahead of the best shallow one ({best_deep} {deep:.2f}, "
            f"{best_shallow} {shallow:.2f}), but not every deep one is."
        )
    return (
        f"Deep prompts are not ahead of shallow ones here: {best_shallow} {shallow:.2f}, "
        f"{best_deep} {deep:.2f}."
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
        left.set(title="Training, mean of 8 steps", xlabel="step", ylabel="loss", ylim=(0, None))
        left.legend(frameon=False, fontsize=9)
        names = list(rows)
        bars = right.barh(names, [rows[n]["loss"] for n in names], color=[COLORS[n] for n in names])
        right.bar_label(bars, fmt="%.2f", padding=3)
        right.invert_yaxis()
        right.margins(x=0.15)
        right.set(title="Held-out loss")
        figure.savefig(path, dpi=110)
        plt.close(figure)
