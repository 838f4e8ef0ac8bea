"""The steps of the demo, in order."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fusetune
from fusetune import env

from . import checkpoint, screen
from . import model as models
from .compare import compare, rounding
from .data import PackedText, load_documents, split
from .plot import draw
from .training import Trainer, evaluate


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on. Raises ValueError for numbers that make no sense."""

    model: str = models.DEFAULT_MODEL
    data: Path | None = None
    steps: int = 60
    compare_steps: int = 4
    batch_size: int = 2
    seq_len: int = 256
    lr: float = 1e-3
    rank: int = 16
    dropout: float = 0.05
    seed: int = 0
    out: Path = Path("demo_output")
    resume: bool = False
    question: str = "My laptop screen is black."

    def __post_init__(self) -> None:
        for name in ("steps", "compare_steps", "batch_size", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.seq_len < 8:
            raise ValueError(f"seq_len: must be at least 8, got {self.seq_len}")
        if not self.lr > 0:
            raise ValueError(f"lr: must be above 0, got {self.lr}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: must be in [0, 1), got {self.dropout}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed: must be in [0, 2^31), got {self.seed}")

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued."""
        names = {f.name for f in fields(self)} - {"out", "resume", "question", "compare_steps"}
        return {name: str(getattr(self, name)) for name in sorted(names)}


CHECKPOINT = "checkpoint.pt"


class Interrupted(Exception):
    """Ctrl-C or SIGTERM; everything up to the last finished step is saved."""


def run(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Runs the demo, writes its files into `settings.out` and returns the report.

    Raises: ValueError for settings, data or a model that cannot be used; Interrupted.
    """
    console = console or Console()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    began = time.perf_counter()
    models.quiet()
    saved = continued(settings) if settings.resume else {}

    screen.heading(console, "Model and data")
    train, held_out = split(load_documents(settings.data), 0.1, settings.seed)
    settings.out.mkdir(parents=True, exist_ok=True)
    with console.status("loading and quantising the model"):
        base = models.prepare_base(settings.model, settings.out / "base", device)
        tokenizer = models.load_tokenizer(base)
        model = models.load_base(base, device)
        model = models.add_lora(model, settings.rank, settings.dropout, settings.seed)
    text = PackedText(train, tokenizer, settings.seq_len)
    test = PackedText(held_out, tokenizer, settings.seq_len)
    trainer = Trainer(
        model, text, settings.batch_size, settings.lr, settings.steps, settings.seed, device
    )
    screen.show_setup(console, model, settings, text, test, device_name(device))

    if "comparison" not in saved:
        screen.heading(console, "Stock against fused")
        with screen.progress(console, "comparing", 4 * settings.compare_steps + 2) as advance:
            comparison = compare(trainer, settings.compare_steps, settings.dropout, advance)
        saved["comparison"] = comparison.as_dict()
    screen.show_comparison(console, saved["comparison"])

    screen.heading(console, "Training, fused")
    screen.show_report(console, fusetune.fuse(model, lazy_logits=True))

    def held_out_loss() -> float:
        rounds = -(-len(test) // settings.batch_size)
        with screen.progress(console, "held-out text", rounds) as advance:
            return evaluate(model, test, settings.batch_size, device, advance)

    if "step" in saved:
        trainer.load_state(saved)
        console.print(f"continuing after step {trainer.step}")
    else:
        saved["sample_before"] = models.answer(model, tokenizer, settings.question)
        saved["eval_loss_before"] = held_out_loss()
        torch.manual_seed(settings.seed)
    facts = {name: saved[name] for name in ("comparison", "sample_before", "eval_loss_before")}
    train_all(trainer, settings, facts, console)
    training = {
        "losses": trainer.losses,
        "eval_loss_before": facts["eval_loss_before"],
        "eval_loss_after": held_out_loss(),
        "question": settings.question,
        "sample_before": facts["sample_before"],
        "sample_after": models.answer(model, tokenizer, settings.question),
    }
    screen.show_training(console, training)

    screen.heading(console, "Adapter in a stock model")
    model.save_pretrained(settings.out / "adapter")
    check = check_adapter(model, base, settings, test, device)
    screen.show_check(console, check)

    report = {
        "setup": {
            **{k: v for k, v in asdict(settings).items() if k not in ("data", "out", "resume")},
            "data": settings.data.name if settings.data else "chatterbot-corpus",
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "versions": env.information()["versions"],
        },
        "comparison": facts["comparison"],
        "training": training,
        "adapter_check": check,
        "seconds": time.perf_counter() - began,
    }
    (settings.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, settings.out / "report.png")
    console.print(
        f"{settings.out}: adapter/, report.json, report.png; {report['seconds'] / 60:.1f} minutes"
    )
    if not facts["comparison"]["agrees"] or not check["agrees"]:
        raise ValueError(
            "stock and fused differ by more than rounding explains: please report this"
        )
    return report


def continued(settings: Settings) -> dict[str, Any]:
    """The checkpoint in `settings.out`; ValueError when it belongs to other settings."""
    saved = checkpoint.load(settings.out / CHECKPOINT)
    for name, value in settings.identity().items():
        if saved["settings"].get(name) != value:
            raise ValueError(
                f"resume: the checkpoint was made with {name}={saved['settings'].get(name)}, "
                f"now it is {value}; give the same options, or start anew without --resume"
            )
    return saved


def train_all(
    trainer: Trainer, settings: Settings, facts: dict[str, Any], console: Console
) -> None:
    """The remaining steps, with a checkpoint after each."""

    def save() -> None:
        extra = {"settings": settings.identity(), **facts}
        checkpoint.save(settings.out / CHECKPOINT, {**trainer.state(), **extra})

    save()
    bar = screen.training_progress(console, trainer.step, settings.steps)
    with bar as show, stop_signals() as stopped:
        while trainer.step < settings.steps:
            begin = time.perf_counter()
            loss = trainer.train_step()
            save()
            show(trainer.step, loss, trainer.tokens_per_step / (time.perf_counter() - begin))
            if stopped:
                raise Interrupted(f"stopped after step {trainer.step}; --resume goes on from there")


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM fill the list instead of raising; the next one of them acts as usual."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {
        number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_adapter(
    model: Any, base: str, settings: Settings, text: PackedText, device: torch.device
) -> dict[str, Any]:
    """Relative difference of the fused logits to those of a stock model with the saved adapter."""
    from peft import PeftModel

    stock = PeftModel.from_pretrained(models.load_base(base, device), settings.out / "adapter")
    # Inputs that need gradients keep bitsandbytes on the kernels of training: those for inference
    # compute in bfloat16 on some CPUs.
    stock.enable_input_require_grads()
    batch = text.rows(torch.arange(1), device)
    batch.pop("labels")
    expected = stock.eval()(**batch, use_cache=False).logits.detach().float()
    with torch.no_grad():
        logits = model.eval()(**batch, use_cache=False).logits.float()
    difference = ((logits - expected).norm() / expected.norm()).item()
    tolerance = rounding(model)
    return {"difference": difference, "tolerance": tolerance, "agrees": difference <= tolerance}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{env.cpu_label()}, {torch.get_num_threads()} threads"
