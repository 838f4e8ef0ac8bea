"""The README's tables of what this folder measures by other means than run.py."""

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


def prefix_part(found: dict[str, Any]) -> str:
    """From what benchmarks.prefix_part writes."""
    rows = [
        (
            name,
            *(f"{1000 * row[kind]:.1f} ms" for kind in ("torch", "ours", "with prefix")),
            *(f"{row[kind]:.1%}" for kind in ("of_ours", "of_torch")),
        )
        for name, row in found["rows"].items()
    ]
    headers = ("", "torch", "ours", "ours with the prefix", "it adds to ours", "of torch's time")
    return _table(found, headers, rows)


def prompt_tuning(found: dict[str, Any]) -> str:
    """From what benchmarks.prompt_tuning writes."""
    rows = [
        (name, f"{row['step_s']:.2f} s", f"{row['to_as_many_positions']:.3f}")
        for name, row in found["rows"].items()
    ]
    return _table(found, ("", "step", "to as many positions"), rows)


def methods(found: dict[str, Any]) -> str:
    """From what benchmarks.bench_methods writes; parts that were not measured stay empty."""
    rows = [
        (
            name,
            row["model"],
            row["against"],
            *_calls(row.get("calls")),
            *_step(row),
            *_extra(row.get("memory_mib")),
        )
        for name, row in found["rows"].items()
    ]
    headers = (
        "",
        "model",
        "against",
        "calls of a layer, forward",
        "backward",
        "step",
        "",
        "losses differ by",
        "memory for it",
        "",
    )
    batch, tokens = found["sizes"]
    text = _table(found, headers, rows, f", {batch} × {tokens} tokens a step, fp32")
    bare = "; ".join(
        f"{model} {calls['forward']} and {calls['backward']}"
        for model, calls in found.get("bare", {}).items()
    )
    return f"{text}\n\nCalls of a layer without a method: {bare}." if bare else text


def adalora_allocator(found: dict[str, Any]) -> str:
    """From what benchmarks.adalora_allocator writes."""
    rows = [
        (name, f"{row['peft_ms']:.1f} ms", f"{row['ours_ms']:.1f} ms", f"{row['ratio']:.1f}×")
        for name, row in found["rows"].items()
    ]
    return _table(found, ("", "PEFT", "ours", ""), rows)


def multi_adapter(found: dict[str, Any]) -> str:
    """From what benchmarks.multi_adapter writes."""
    rows = []
    for name, row in found["rows"].items():
        times = (f"{1000 * row[f'{kind}_s']:.2f} ms" for kind in ("stock", "fused", "base"))
        rows.append((name, *times, f"{row['speedup']:.2f}×", f"{row['difference']:.0e}"))
    headers = ("", "PEFT", "fused", "PEFT's base layer alone", "", "results differ by")
    return _table(found, headers, rows)


def dora_over_lora(found: dict[str, Any]) -> str:
    """From what benchmarks.dora_over_lora writes."""
    rows = [
        (
            f"{row['m']} × {row['n']} × {row['n']} {row['weight']}"
            + (f", dropout {row['dropout']:g}" if row["dropout"] else ""),
            f"{row['lora_ms']:.1f} ms",
            f"{row['dora_ms']:.1f} ms",
            f"{row['ratio']:.2f}",
        )
        for row in found["rows"]
    ]
    return _table(found, ("forward + backward", "LoRA", "DoRA", "of LoRA's time"), rows)


def memory(found: dict[str, Any]) -> str:
    """From what benchmarks.memory writes; all in MiB."""
    rows = [
        (
            f"{row['op']}, {row['m']} × {row['h']}, {row['width']}",
            *(f"{row[name]:.1f}" for name in ("x_and_y", "parameters", "added")),
            f"{row['added'] / row['x_and_y']:.3f}",
            f"{row['added'] / (row['x_and_y'] + row['parameters']):.3f}",
        )
        for row in found["rows"]
    ]
    headers = ("", "x + y", "gradients of parameters", "added", "of x + y", "of both")
    return _table(found, headers, rows)


def loss_memory(found: dict[str, Any]) -> str:
    """From what benchmarks.loss_memory writes; all in MiB."""
    ways = tuple(found["rows"][0]["added"])
    rows = [
        (row["shape"], f"{row['logits']:.0f}", *(f"{row['added'][way]:.0f}" for way in ways))
        for row in found["rows"]
    ]
    return _table(found, ("", "logits", *ways), rows)


def _calls(calls: dict[str, Any] | None) -> tuple[str, ...]:
    if calls is None:
        return "", ""
    stock, fused = calls["stock"], calls["fused"]
    return tuple(f"{stock[way]} → {fused[way]}" for way in ("forward", "backward"))


def _step(row: dict[str, Any]) -> tuple[str, ...]:
    if "step_s" not in row:
        return "", "", ""
    stock, fused = (1000 * row["step_s"][kind] for kind in ("stock", "fused"))
    difference = f"{row['loss_difference']:.0e}"
    return f"{stock:.0f} → {fused:.0f} ms", f"{row['speedup']:.2f}×", difference


def _extra(memory: dict[str, float] | None) -> tuple[str, ...]:
    if memory is None:
        return "", ""
    stock, fused = memory["stock"], memory["fused"]
    return f"{stock:.0f} → {fused:.0f} MiB", f"{fused / stock - 1:+.0%}"


def _memory(name: str, row: dict[str, float], part: str) -> tuple[str, ...]:
    stock = row["stock" + part]
    others = (row[kind + part] for kind in ("fused", "fused, checkpointing"))
    return name, f"{stock:.0f} MiB", *(f"{m:.0f} MiB ({m / stock - 1:+.0%})" for m in others)


def _table(
    found: dict[str, Any], headers: tuple[str, ...], rows: list[Any], setting: str = ""
) -> str:
    align = ("left", *["right"] * (len(headers) - 1))
    table = tabulate(rows, headers, tablefmt="pipe", colalign=align, disable_numparse=True)
    return f"{found['cpu']}, {found['threads']} threads{setting}:\n\n{table}"
