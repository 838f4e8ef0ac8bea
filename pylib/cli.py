"""The `fusetune` command. What a subcommand needs is imported when it runs."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Fused kernels for parameter-efficient fine-tuning of Hugging Face models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def env() -> None:
    """Versions, CPU features, the backend of every op and why, GPUs."""
    from fusetune.env import describe

    typer.echo(describe())


@app.command()
def verify(
    backend: Annotated[
        str,
        typer.Option(
            help="auto: what this machine has. cpu; triton, cuda: on its GPU. triton-sim, "
            "cuda-sim: these kernels' PTX interpreted, without a GPU."
        ),
    ] = "auto",
) -> None:
    """Checks every kernel against the reference. Exit code 1: one failed; 2: they cannot run."""
    from fusetune.verify import report

    raise typer.Exit(report(backend, typer.echo))


@app.command()
def bench(
    op: Annotated[str, typer.Option(help="One op; all of them when left out.")] = "",
    size: Annotated[int, typer.Option(help="Rows and columns of the weight.", min=64)] = 4096,
    seconds: Annotated[float, typer.Option(help="Time for each line.", min=0.01)] = 1.0,
) -> None:
    """Times the kernels against bitsandbytes, PEFT and torch, in one run, in turn."""
    from dataclasses import asdict

    import torch

    from fusetune.bench import OPS, cases_of, measure, table
    from fusetune.env import cpu_label

    typer.echo(f"{cpu_label()}, {torch.get_num_threads()} threads")
    for name in [op] if op else OPS:
        rows = [asdict(measure(case, seconds)) for case in cases_of(name, False, size, size)]
        typer.echo(f"\n{name}\n{table(rows)}")


@app.command()
def demo(
    model: Annotated[
        str, typer.Option(help="A Hugging Face model, or a folder with one.")
    ] = "smollm2-135m-instruct",
    data: Annotated[
        Path | None,
        typer.Option(help="Your text: .txt, .jsonl or .yml; chatterbot-corpus if none."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 60,
    compare_steps: Annotated[
        int, typer.Option(help="Steps of stock against fused, before the training.")
    ] = 4,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 2,
    seq_len: Annotated[int, typer.Option(help="Tokens of a row.")] = 256,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    rank: Annotated[int, typer.Option(help="LoRA's r.")] = 16,
    dropout: Annotated[float, typer.Option(help="LoRA's dropout.")] = 0.05,
    seed: Annotated[int, typer.Option()] = 0,
    question: Annotated[
        str, typer.Option(help="What the model is asked before and after.")
    ] = "My laptop screen is black.",
    out: Annotated[Path, typer.Option(help="Folder for adapter, report and checkpoint.")] = Path(
        "demo_output"
    ),
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in --out.")] = False,
) -> None:
    """Fine-tunes a model with QLoRA: stock against fused, then the training, from end to end."""
    from fusetune.demo import Interrupted, Settings, run

    settings = Settings(
        model=model,
        data=data,
        steps=steps,
        compare_steps=compare_steps,
        batch_size=batch_size,
        seq_len=seq_len,
        lr=lr,
        rank=rank,
        dropout=dropout,
        seed=seed,
        question=question,
        out=out,
        resume=resume,
    )
    try:
        run(settings)
    except Interrupted as stopped:
        typer.echo(str(stopped), err=True)
        raise typer.Exit(130) from None


def main() -> None:
    """Entry point: what a user got wrong ends in one line and exit code 2, not in a traceback."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # hints at optional packages
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
