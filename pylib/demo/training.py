"""The training loop: plain PyTorch, the same for the stock and the fused model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .checkpoint import State, restore, snapshot, trainable
from .data import PackedText


@dataclass
class Trainer:
    """One optimiser step at a time over an endless shuffled stream of packed text."""

    model: Any
    text: PackedText
    batch_size: int
    lr: float
    steps: int
    seed: int
    device: torch.device

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(
            trainable(self.model).values(), lr=self.lr, weight_decay=0.0
        )
        self.step = 0
        self.losses: list[float] = []

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.text.input_ids.shape[1]

    def learning_rate(self) -> float:
        """Linear warm-up over the first tenth, then half a cosine down to a tenth."""
        warm = max(1, self.steps // 10)
        if self.step < warm:
            return self.lr * (self.step + 1) / warm
        done = min(1.0, (self.step - warm) / max(1, self.steps - warm))
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

    def train_step(self) -> float:
        """Forward, backward, clip, update. Returns the loss; ValueError when it is not finite."""
        self.model.train()
        batch = self.text.batch(self.step, self.batch_size, self.seed, self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable(self.model).values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(f"training: the loss is {value} at step {self.step}; try a lower --lr")
        self.step += 1
        self.losses.append(value)
        return value

    def state(self) -> State:
        return {
            **snapshot(self.model, self.optimizer),
            "step": self.step,
            "losses": list(self.losses),
        }

    def load_state(self, state: State) -> None:
        restore(state, self.model, self.optimizer)
        self.step, self.losses = state["step"], list(state["losses"])


def evaluate(
    model: Any,
    text: PackedText,
    batch_size: int,
    device: torch.device,
    progress: Callable[[], None] = lambda: None,
) -> float:
    """Mean loss per learnt token over all of `text`."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for rows in torch.arange(len(text)).split(batch_size):
            batch = text.rows(rows, device)
            tokens = int((batch["labels"] >= 0).sum())
            total += model(**batch, use_cache=False).loss.item() * tokens
            count += tokens
            progress()
    model.train(was_training)
    return total / count
