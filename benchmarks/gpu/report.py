"""The results of a card as tables in Markdown, goals beside what was measured, and plots.

python -m benchmarks.gpu.report benchmarks/results/CARD.json
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TITLES = {
    "lora": "One LoRA layer 4096 × 4096 on NF4, forward and backward",
    "layer": "The linears of a Llama-8B layer with LoRA on NF4, forward and backward",
    "linear": "NF4 linear, forward without gradients",
    "dequantize": "Dequantisation of double-quantised NF4",
    "prefix": "Attention to a prefix, and a prompt's embeddings, forward and backward",
    "model": "A model's loss, rotary embedding, norms and gated activation, forward and backward",
    "dora": "DoRA's row norms",
    "ways": "Ways of the base matmul with a LoRA tail (ours: the default)",
}

# Cases along M, and the title of their picture.
PLOTS = {
    "lora M={} r=16 p=0": "one linear, p = 0",
    "lora M={} r=16 p=0.1": "one linear, p = 0.1",
    "layer M={} r=16 p=0": "Llama-8B layer, p = 0",
    "linear 4096x4096 M={}": "NF4 linear, forward",
}


def markdown(stored: dict[str, Any]) -> str:
    parts = [f"# {stored['card'].get('name', 'no card')}", "", facts(stored["card"])]
    if stored.get("simulated"):
        parts += ["", "Simulated: shapes are tiny and results were checked; nothing was timed."]
    old = [key for key, case in stored["cases"].items() if case["source"] != stored["source"]]
    if old:
        parts += ["", f"Measured with earlier sources: {', '.join(old)}."]
    parts += ["", steps(stored["steps"])]
    for group, title in TITLES.items():
        rows = [(k, v) for k, v in stored["cases"].items() if v["group"] == group]
        if rows:
            parts += ["", f"## {title}", "", group_table(rows, stored["card"])]
    met = list(goals(stored))
    if met:
        parts += ["", "## Goals", "", "| goal | measured |", "| --- | ---: |"]
        parts += [f"| {goal} | {value} |" for goal, value in met]
    return "\n".join(parts) + "\n"


def facts(card: dict[str, Any]) -> str:
    return "\n".join(
        f"- {name}: {value:.4g}" if isinstance(value, float) else f"- {name}: {value}"
        for name, value in card.items()
    )


def steps(entries: dict[str, Any]) -> str:
    lines = ["| step | state | seconds | |", "| --- | --- | ---: | --- |"]
    for name, entry in entries.items():
        note = entry.get("note", "").replace("|", "/")
        lines.append(f"| {name} | {entry['state']} | {entry['seconds']:.0f} | {note} |")
    return "\n".join(lines)


def group_table(rows: list[tuple[str, Any]], card: dict[str, Any]) -> str:
    """Ours in ms, how many times longer each other takes, peak memory of ours and the least."""
    others = list(dict.fromkeys(n for _, v in rows for n in v.get("contenders", {}) if n != "ours"))
    head = ["case", "ms", *(f"{name} takes" for name in others), "peak MiB", "others", "error"]
    with_speed = any("bytes" in v for _, v in rows) and "copy_gbs" in card
    head += ["of copy speed"] if with_speed else []
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for key, entry in rows:
        measured = entry.get("contenders")
        if measured is None:
            lines.append([key, entry.get("failure", "not done"), *[""] * (len(head) - 2)])
            continue
        ours = measured["ours"]
        peaks = [v["peak_mib"] for n, v in measured.items() if n != "ours" and "peak_mib" in v]
        line = [key, number(ours.get("ms"))]
        line += [number(measured.get(name, {}).get("ratio"), "×") for name in others]
        line += [number(ours.get("peak_mib")), number(min(peaks, default=None))]
        line.append(f"{entry['error']:.0e}" if "error" in entry else "")
        if with_speed:
            line.append(f"{entry['bytes'] / ours['ms'] / 1e6 / card['copy_gbs']:.0%}")
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.3g}{unit}"


def goals(stored: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What was promised of a card, and the ratios that were measured; nothing where nothing was."""
    cases, card = stored["cases"], stored["card"]

    def ratio(key: str, other: str) -> float | None:
        return cases.get(key, {}).get("contenders", {}).get(other, {}).get("ratio")

    def least(keys: list[str], others: tuple[str, ...]) -> str | None:
        found = [r for key in keys for other in others if (r := ratio(key, other)) is not None]
        return f"{min(found):.2f}×" if found else None

    one, dropped = "lora M=4096 r=16 p=0", "lora M=4096 r=16 p=0.1"
    few = [f"linear 4096x4096 M={m}" for m in (8, 16, 64, 256)]
    plain = [k for k in cases if k.startswith("dequantize")]
    wanted = (
        ("one linear ≥ 1.4× PEFT", [one], ("PEFT scheme", "PEFT + bitsandbytes")),
        ("one linear ≥ 1.2× Unsloth's scheme", [one], ("Unsloth scheme",)),
        ("dropout 0.1 ≥ 1.6× PEFT", [dropped], ("PEFT scheme", "PEFT + bitsandbytes")),
        ("NF4, M = 8 to 256, ≥ 1.5× bitsandbytes", few, ("bitsandbytes",)),
        ("the same, three launches + matmul", few, ("three launches + matmul",)),
        ("dequantisation ≥ 1.15× bitsandbytes", plain, ("bitsandbytes",)),
        ("the same, three launches", plain, ("three launches",)),
    )
    for goal, keys, others in wanted:
        if (value := least(keys, others)) is not None:
            yield goal, value
    entry = cases.get("dequantize 4096x4096", {})
    if "copy_gbs" in card and "ms" in entry.get("contenders", {}).get("ours", {}):
        speed = entry["bytes"] / entry["contenders"]["ours"]["ms"] / 1e6
        yield "dequantisation ≥ 85 % of copy speed", f"{speed / card['copy_gbs']:.0%}"
    norm = cases.get("dora 4096x4096 r=16", {}).get("contenders", {}).get("ours", {}).get("ms")
    step = cases.get(one, {}).get("contenders", {}).get("ours", {}).get("ms")
    if norm is not None and step is not None:
        yield "LoRA and DoRA's norm ≤ 1.15× LoRA (M = 4096)", f"{1 + norm / step:.2f}×"


def plot(stored: dict[str, Any], path: Path) -> str | None:
    """Writes a picture; the reason where it cannot."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        return f"no plots: {error}"
    panels = []
    for start, title in PLOTS.items():
        lines = series(stored["cases"], start)
        if lines:
            panels.append((title, lines))
    if not panels:
        return "no plots: nothing was timed"
    columns = min(2, len(panels))
    shape = math.ceil(len(panels) / columns), columns
    figure, axes = pyplot.subplots(
        *shape, figsize=(6 * columns, 4 * shape[0]), squeeze=False, layout="constrained"
    )
    for axis, (title, lines) in zip(axes.flat, panels, strict=False):
        for name, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", xlabel="M", ylabel="times ours", title=title, ylim=(0, None))
        axis.legend()
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    figure.suptitle(f"{stored['card'].get('name')}: time over fusetune's")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return None


def series(cases: dict[str, Any], key: str) -> dict[str, list[tuple[int, float]]]:
    """(M, ratio) of every contender but ours."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for m in (1, 8, 16, 64, 256, 1024, 4096):
        for name, value in cases.get(key.format(m), {}).get("contenders", {}).items():
            if name != "ours" and "ratio" in value:
                lines.setdefault(name, []).append((m, value["ratio"]))
    return lines


def write(path: Path) -> str:
    """Tables beside the results, and a picture; the tables."""
    stored = json.loads(path.read_text())
    text = markdown(stored)
    path.with_suffix(".md").write_text(text)
    why = plot(stored, path.with_suffix(".png"))
    return text if why is None else f"{text}\n{why}\n"


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
