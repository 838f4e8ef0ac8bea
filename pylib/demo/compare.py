"""Stock against fused on one model: the same losses, then step time and peak memory."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

import fusetune

from .memory import Peak, PeakMeter
from .model import set_dropout
from .training import Trainer


@dataclass(frozen=True)
class Timing:
    """Medians over the timed steps of one variant. Memory in MiB, None where not measurable."""

    step_s: float
    tokens_per_s: float
    peak_mib: float | None
    step_peak_mib: float | None  # above what was resident before the step


@dataclass(frozen=True)
class Comparison:
    """`speedup` is the median of the ratios of neighbouring steps, stock over fused."""

    losses: dict[str, list[float]]
    loss_tolerance: float
    stock: Timing
    fused: Timing
    speedup: float
    pairs: int

    @property
    def loss_difference(self) -> float:
        """Largest relative difference of two losses of the same step."""
        pairs = zip(self.losses["stock"], self.losses["fused"], strict=True)
        return max(abs(a - b) / abs(a) for a, b in pairs)

    @property
    def agrees(self) -> bool:
        return self.loss_difference <= self.loss_tolerance

    @property
    def memory_saved(self) -> float | None:
        """Share of the stock step's peak that the fused one does without."""
        return saved(self.stock.peak_mib, self.fused.peak_mib)

    @property
    def step_memory_saved(self) -> float | None:
        return saved(self.stock.step_peak_mib, self.fused.step_peak_mib)

    def as_dict(self) -> dict[str, Any]:
        derived = ("loss_difference", "agrees", "memory_saved", "step_memory_saved")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def saved(stock: float | None, fused: float | None) -> float | None:
    return None if stock is None or fused is None else 1 - fused / stock


def compare(
    trainer: Trainer, steps: int, dropout: float, progress: Callable[[], None] = lambda: None
) -> Comparison:
    """`steps` of each variant without dropout from one state, then as many timed pairs with it.

    Timed steps alternate stock, fused, fused, stock, ... so that a machine that slows down slows
    both; one pair before them is not counted. The trainer is left as it was found.
    """
    start = copy.deepcopy(trainer.state())
    set_dropout(trainer.model, 0.0)
    losses: dict[str, list[float]] = {}
    for variant in ("stock", "fused"):
        trainer.load_state(start)
        with mode(trainer.model, variant):
            losses[variant] = []
            for _ in range(steps):
                losses[variant].append(trainer.train_step())
                progress()

    set_dropout(trainer.model, dropout)
    seconds: dict[str, list[float]] = {"stock": [], "fused": []}
    peaks: dict[str, list[Peak]] = {"stock": [], "fused": []}
    for pair in range(steps + 1):
        for variant in ("stock", "fused") if pair % 2 == 0 else ("fused", "stock"):
            # Both halves of a pair take the same batch.
            trainer.load_state({**trainer.state(), "step": start["step"] + pair})
            with mode(trainer.model, variant):
                elapsed, peak = measured_step(trainer)
            progress()
            if pair > 0:
                seconds[variant].append(elapsed)
                peaks[variant] += [peak] if peak is not None else []
    trainer.load_state(start)
    ratios = [s / f for s, f in zip(seconds["stock"], seconds["fused"], strict=True)]
    return Comparison(
        losses=losses,
        loss_tolerance=loss_tolerance(trainer.model, steps),
        stock=timing(seconds["stock"], peaks["stock"], trainer.tokens_per_step),
        fused=timing(seconds["fused"], peaks["fused"], trainer.tokens_per_step),
        speedup=statistics.median(ratios),
        pairs=steps,
    )


def mode(model: Any, variant: str) -> contextlib.AbstractContextManager[Any]:
    return (
        fusetune.fused(model, lazy_logits=True) if variant == "fused" else contextlib.nullcontext()
    )


def measured_step(trainer: Trainer) -> tuple[float, Peak | None]:
    with PeakMeter(trainer.device) as meter:
        synchronize(trainer.device)
        begin = time.perf_counter()
        trainer.train_step()
        synchronize(trainer.device)
        elapsed = time.perf_counter() - begin
    return elapsed, meter.peak


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timing(seconds: list[float], peaks: list[Peak], tokens: int) -> Timing:
    median = statistics.median(seconds)
    return Timing(
        step_s=median,
        tokens_per_s=tokens / median,
        peak_mib=statistics.median(p.total for p in peaks) if peaks else None,
        step_peak_mib=statistics.median(p.extra for p in peaks) if peaks else None,
    )


def rounding(model: Any) -> float:
    """Relative error that rounding alone explains between two exact ways to compute a model.

    Each linear layer adds errors of a few eps of its output dtype; over `n` layers in a row they
    add up like a random walk, hence sqrt(n). The factor 8 covers the reductions inside a layer.
    """
    from peft.tuners.lora import LoraLayer

    layers = sum(isinstance(m, LoraLayer) for m in model.modules())
    return 8 * math.sqrt(max(1, layers)) * torch.finfo(model.dtype).eps


def loss_tolerance(model: Any, steps: int) -> float:
    """Rounding, once for every step: an update carries the error of its gradient into the next."""
    return steps * rounding(model)
