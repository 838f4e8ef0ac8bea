"""What the demo prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


def heading(console: Console, title: str) -> None:
    console.rule(f"[bold]{title}", align="left")


def bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
    )


@contextmanager
def progress(console: Console, title: str, total: int) -> Iterator[Callable[[], None]]:
    with bar(console) as shown:
        task = shown.add_task(title, total=total, note="")
        yield lambda: shown.advance(task)


@contextmanager
def training_progress(
    console: Console, done: int, total: int
) -> Iterator[Callable[[int, float, float], None]]:
    """Yields show(step, loss, tokens_per_s). Every tenth of the way is also printed as a line."""
    every = max(1, total // 10)
    with bar(console) as shown:
        task = shown.add_task("training", total=total, completed=done, note="")

        def show(step: int, loss: float, tokens_per_s: float) -> None:
            note = f"loss {loss:.3f}  {tokens_per_s:.0f} tokens/s"
            shown.update(task, completed=step, note=note)
            if step % every == 0 or step == total:
                console.print(f"step {step:>4} of {total}  {note}", highlight=False)

        yield show


def show_setup(
    console: Console, model: Any, settings: Any, text: Any, test: Any, device: str
) -> None:
    trained, total = model.get_nb_trainable_parameters()
    console.print(
        f"{settings.model}: {total / 1e6:.0f} M parameters, NF4 with double quantisation "
        f"(bitsandbytes)\n"
        f"LoRA r={settings.rank} on all linear layers (PEFT): {trained / 1e6:.1f} M trained\n"
        f"text: {text.n_tokens} tokens to learn, {test.n_tokens} held out\n"
        f"device: {device}",
        highlight=False,
        soft_wrap=True,
    )


def show_comparison(console: Console, comparison: dict[str, Any]) -> None:
    losses = Table("step", "stock", "fused", title="loss without dropout", title_justify="left")
    pairs = zip(comparison["losses"]["stock"], comparison["losses"]["fused"], strict=True)
    for step, (stock, fused) in enumerate(pairs, 1):
        losses.add_row(str(step), f"{stock:.7f}", f"{fused:.7f}")
    console.print(losses)
    verdict = "agree" if comparison["agrees"] else "[bold red]DIFFER[/]"
    console.print(
        f"losses {verdict}: largest relative difference {comparison['loss_difference']:.1e}, "
        f"rounding explains {comparison['loss_tolerance']:.1e}\n",
        soft_wrap=True,
    )
    table = Table("", "stock", "fused", "", title="a step with dropout", title_justify="left")
    stock, fused = comparison["stock"], comparison["fused"]
    table.add_row(
        "time",
        f"{stock['step_s']:.2f} s",
        f"{fused['step_s']:.2f} s",
        f"{comparison['speedup']:.2f}×",
    )
    table.add_row("tokens/s", f"{stock['tokens_per_s']:.0f}", f"{fused['tokens_per_s']:.0f}", "")
    for label, key, share in (
        ("peak memory, all", "peak_mib", "memory_saved"),
        ("peak memory, the step's own", "step_peak_mib", "step_memory_saved"),
    ):
        if comparison[share] is not None:
            sizes = (f"{variant[key]:.0f} MiB" for variant in (stock, fused))
            table.add_row(label, *sizes, f"{-comparison[share]:+.0%}")
    console.print(table)


def show_report(console: Console, report: Any) -> None:
    console.print(str(report), highlight=False, markup=False, soft_wrap=True)


def show_training(console: Console, training: dict[str, Any]) -> None:
    console.print(
        f"held-out loss {training['eval_loss_before']:.3f} before, "
        f"{training['eval_loss_after']:.3f} after\n"
        f"  question: {training['question']}\n"
        f"  before:   {training['sample_before']}\n"
        f"  after:    {training['sample_after']}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def show_check(console: Console, check: dict[str, Any]) -> None:
    verdict = "agree" if check["agrees"] else "[bold red]DIFFER[/]"
    console.print(
        f"saved with save_pretrained, loaded into an unfused model: logits {verdict} "
        f"(relative difference {check['difference']:.1e}, "
        f"rounding explains {check['tolerance']:.1e})",
        soft_wrap=True,
    )
