"""Renders the measured tables into README.md, so that no figure is ever typed by hand.

    python -m benchmarks.readme                       from benchmarks/results/
    python -m benchmarks.readme --demo demo_output    takes over a demo's report and picture first
    python -m benchmarks.readme --adapters adapters_output    likewise, of examples.adapters_minilm
    python -m benchmarks.readme --prompts prompts_output      likewise, of examples.prompts_smollm2
    python -m benchmarks.readme --glue glue_output            likewise, of examples.glue_of_methods
    python -m benchmarks.readme --check               exit code 1 when README.md is out of date

A table stands between <!-- results:NAME --> and <!-- end -->, NAME an op, "demo",
"adapters", "prompts", "glue", "methods", or "report" for what `fuse` says of a small model.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fusetune
from benchmarks import bound, bound_adapters, bound_model, method_tables
from benchmarks.run import slug
from examples import adapters_report, glue_report, prompts_report
from fusetune.bench import table

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
PREDICTED = RESULTS / "predicted.json"
BUDGETS = ROOT / "tests" / "compile" / "budgets.json"
PICTURE = ROOT / "docs" / "demo.png"
ADAPTERS = RESULTS / "adapters-minilm.json"
PROMPTS = RESULTS / "prompts-smollm2.json"
PROMPTS_RATES = RESULTS / "prompts-rates.json"
PROMPTS_PICTURE = ROOT / "docs" / "prompts_smollm2.png"
GLUE = RESULTS / "glue.json"
GLUE_PICTURE = ROOT / "docs" / "glue_of_methods.png"
METHODS = RESULTS / "methods.json"
ADAPTERS_PICTURE = ROOT / "docs" / "adapters_minilm.png"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme")
    parser.add_argument("--demo", type=Path, help="output folder of a demo to take over")
    parser.add_argument("--adapters", type=Path, help="output folder of examples.adapters_minilm")
    parser.add_argument("--prompts", type=Path, help="output folder of examples.prompts_smollm2")
    parser.add_argument("--glue", type=Path, help="output folder of examples.glue_of_methods")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.demo:
        PICTURE.parent.mkdir(exist_ok=True)
        shutil.copy(options.demo / "report.png", PICTURE)
        report = (options.demo / "report.json").read_text()
        device = json.loads(report)["setup"]["device"]
        (RESULTS / f"demo-{slug(device)}.json").write_text(report)
    if options.adapters:
        shutil.copy(options.adapters / ADAPTERS_PICTURE.name, ADAPTERS_PICTURE)
        ADAPTERS.write_text((options.adapters / ADAPTERS.name).read_text())
    if options.prompts:
        shutil.copy(options.prompts / PROMPTS_PICTURE.name, PROMPTS_PICTURE)
        for path in (PROMPTS, PROMPTS_RATES):
            path.write_text((options.prompts / path.name).read_text())
    if options.glue:
        shutil.copy(options.glue / GLUE_PICTURE.name, GLUE_PICTURE)
        GLUE.write_text((options.glue / GLUE.name).read_text())
    before = README.read_text()
    after = re.sub(
        r"(<!-- results:(\w+) -->\n).*?(<!-- end -->)",
        lambda found: found[1] + section(found[2]) + found[3],
        before,
        flags=re.DOTALL,
    )
    if options.check and after != before:
        print("README.md differs from benchmarks/results: python -m benchmarks.readme")
        return 1
    README.write_text(after)
    return 0


def section(name: str) -> str:
    if name == "report":
        return f"```text\n{fuse_report()}\n```\n"
    if name == "demo":
        return demo_tables()
    tables: dict[str, tuple[Callable[[Any], str], Path]] = {
        "predicted": (bound.markdown, PREDICTED),
        "predicted_adapters": (bound_adapters.markdown, PREDICTED),
        "predicted_model": (bound_model.markdown, PREDICTED),
        "budgets": (budgets_table, BUDGETS),
        "adapters": (adapters_report.tables, ADAPTERS),
        "prompts": (prompts_report.table, PROMPTS),
        "glue": (glue_report.table, GLUE),
        "methods": (method_tables.methods, METHODS),
        "prefix_tuning": (method_tables.prefix_tuning, RESULTS / "prefix-tuning.json"),
        "prefix_part": (method_tables.prefix_part, RESULTS / "prefix-part.json"),
        "prompt_tuning": (method_tables.prompt_tuning, RESULTS / "prompt-tuning.json"),
        "adalora_allocator": (method_tables.adalora_allocator, RESULTS / "adalora-allocator.json"),
        "multi_adapter": (method_tables.multi_adapter, RESULTS / "multi-adapter.json"),
        "memory": (method_tables.memory, RESULTS / "memory.json"),
        "loss_memory": (method_tables.loss_memory, RESULTS / "loss-memory.json"),
        "dora_over_lora": (method_tables.dora_over_lora, RESULTS / "dora-over-lora.json"),
    }
    if name not in tables:
        return op_tables(name)
    table_of, path = tables[name]
    return f"{table_of(json.loads(path.read_text()))}\n"


def fuse_report() -> str:
    """A LLaMA with LoRA on two of its linear layers and, which is not fused, on its embedding."""
    import peft
    import transformers

    size = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64}
    config = transformers.LlamaConfig(**size, num_hidden_layers=30, num_attention_heads=4)
    lora = peft.LoraConfig(
        target_modules=["q_proj", "v_proj", "embed_tokens"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
    return str(fusetune.fuse(model))


def budgets_table(recorded: dict[str, dict[str, dict[str, int]]]) -> str:
    """One line for each kernel: what it takes on the architectures it is compiled for."""
    kernels: dict[tuple[str, str], list[dict[str, int]]] = {}
    for backend in ("triton", "cuda"):
        for name, found in recorded[f"compiled-{backend}"].items():
            kernel = name.partition(", ")[2]
            kernels.setdefault((backend, kernel), []).append(found)
    lines = [
        "| kernel | backend | architectures | registers | shared memory, KiB |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for (backend, kernel), found in kernels.items():
        registers = sorted(one["registers"] for one in found)
        shared = sorted(one["shared"] / 1024 for one in found)
        name = kernel.replace("|", r"\|")
        lines.append(
            f"| `{name}` | {backend} | {len(found)} | {registers[0]}–{registers[-1]} "
            f"| {shared[0]:.0f}–{shared[-1]:.0f} |"
        )
    return "\n".join(lines)


def op_tables(op: str) -> str:
    """One table for each machine that has results for the op."""
    parts = []
    for path in sorted(RESULTS.glob("*.json")):
        stored = json.loads(path.read_text())
        result = stored.get("ops", {}).get(op)
        if result is None:
            continue
        versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
        parts.append(
            f"{stored['cpu']}, {result['threads']} threads, "
            f"{result['date']}; {versions}\n\n{table(result['rows'])}\n"
        )
    return "\n".join(parts) or "Not measured yet.\n"


def demo_tables() -> str:
    """One for each machine."""
    reports = sorted(RESULTS.glob("demo-*.json"))
    tables = "\n".join(demo_table(json.loads(path.read_text())) for path in reports)
    return tables or "Not measured yet.\n"


def demo_table(report: dict[str, Any]) -> str:
    setup, comparison, training = (report[k] for k in ("setup", "comparison", "training"))
    stock, fused = comparison["stock"], comparison["fused"]
    lines = [
        f"{setup['model']}, {setup['batch_size']} × {setup['seq_len']} tokens a step, "
        f"{setup['device']}:",
        "",
        "| | stock | fused | |",
        "| --- | ---: | ---: | ---: |",
        f"| time of a step | {stock['step_s']:.2f} s | {fused['step_s']:.2f} s "
        f"| {comparison['speedup']:.2f}× |",
        f"| tokens/s | {stock['tokens_per_s']:.0f} | {fused['tokens_per_s']:.0f} | |",
    ]
    for label, key, share in (
        ("peak memory of the process", "peak_mib", "memory_saved"),
        ("of that, added by the step", "step_peak_mib", "step_memory_saved"),
    ):
        if comparison[share] is not None:
            lines.append(
                f"| {label} | {stock[key]:.0f} MiB | {fused[key]:.0f} MiB "
                f"| {-comparison[share]:+.0%} |"
            )
    lines += [
        f"| largest relative difference of losses, dropout 0 "
        f"| | {comparison['loss_difference']:.0e} | |",
        f"| held-out loss, before and after {setup['steps']} steps "
        f"| | {training['eval_loss_before']:.2f} → {training['eval_loss_after']:.2f} | |",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
