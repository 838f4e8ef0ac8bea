"""Labelled texts, batches, and the training loop of the examples."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Tensor = torch.Tensor
Batch = tuple[dict[str, Tensor], Tensor]
MAX_TOKENS = 32  # 97 % of WordNet's glosses have no more


@dataclass(frozen=True)
class Texts:
    """Token ids of texts, and the number of each one's label."""

    ids: list[list[int]]
    targets: list[int]

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, rows: list[int]) -> Texts:
        return Texts([self.ids[row] for row in rows], [self.targets[row] for row in rows])


def split(
    texts: dict[str, list[str]], tokenizer: Any, train: int, held_out: int, seed: int = 0
) -> tuple[Texts, Texts]:
    """(train, held out): so many texts of each label, all different; labels in order."""
    rng = random.Random(seed)
    parts: tuple[list[tuple[str, int]], ...] = ([], [])
    for number, label in enumerate(sorted(texts)):
        drawn = rng.sample(texts[label], train + held_out)
        parts[0].extend((text, number) for text in drawn[:train])
        parts[1].extend((text, number) for text in drawn[train:])
    result = []
    for part in parts:
        ids = tokenizer([text for text, _ in part], truncation=True, max_length=MAX_TOKENS)
        result.append(Texts(ids["input_ids"], [number for _, number in part]))
    return result[0], result[1]


def only(texts: Texts, labels: Iterable[int]) -> Texts:
    """The texts of some labels."""
    wanted = set(labels)
    return texts.rows([row for row, target in enumerate(texts.targets) if target in wanted])


def divide(texts: Texts, count: int) -> tuple[Texts, Texts]:
    """(the first `count` texts of each label, the others)"""
    seen: Counter[int] = Counter()
    first: list[int] = []
    rest: list[int] = []
    for row, target in enumerate(texts.targets):
        seen[target] += 1
        (first if seen[target] <= count else rest).append(row)
    return texts.rows(first), texts.rows(rest)


def batches(texts: Texts, size: int, steps: int, seed: int = 0) -> Iterator[Batch]:
    """`steps` batches at random. Each pass over the texts takes every one of them once; those of
    similar length go together, for less padding."""
    rng = random.Random(seed)
    made: list[list[int]] = []
    for _ in range(steps):
        if not made:
            order = rng.sample(range(len(texts)), len(texts))
            for start in range(0, len(order), 8 * size):
                window = sorted(order[start : start + 8 * size], key=lambda i: len(texts.ids[i]))
                made += [window[at : at + size] for at in range(0, len(window), size)]
            rng.shuffle(made)
        yield collate(texts, made.pop())


def collate(texts: Texts, rows: list[int]) -> Batch:
    """(the model's arguments, targets [batch]), padded to the longest text."""
    longest = max(len(texts.ids[row]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)  # 0 is BERT's padding
    for at, row in enumerate(rows):
        ids[at, : len(texts.ids[row])] = torch.tensor(texts.ids[row])
    targets = torch.tensor([texts.targets[row] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}, targets


class Trainer:
    """One model in training: AdamW, the rate warmed up over a tenth of the steps, then linearly
    down to zero. `rates`: (parameters' owner, learning rate); what is frozen stays out."""

    def __init__(
        self, logits: Callable[..., Tensor], rates: list[tuple[nn.Module, float]], steps: int
    ) -> None:
        self.logits = logits
        self.modules = [module for module, _ in rates]
        groups = []
        seen: set[int] = set()
        for module, rate in rates:
            found = [p for p in module.parameters() if p.requires_grad and id(p) not in seen]
            seen.update(map(id, found))
            groups.append({"params": found, "lr": rate})
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.01)
        warm = max(1, steps // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda s: min((s + 1) / warm, (steps - s) / max(1, steps - warm), 1.0)
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self, batch: Batch) -> float:
        arguments, targets = batch
        for module in self.modules:
            module.train()
        loss = self.loss(arguments, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.updated()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return loss.item()

    def loss(self, arguments: dict[str, Tensor], targets: Tensor) -> Tensor:
        return functional.cross_entropy(self.logits(**arguments), targets)

    def updated(self) -> None:
        """After each update, while the gradients are still there."""

    def fit(self, texts: Texts, size: int, steps: int, seed: int = 0) -> None:
        for batch in batches(texts, size, steps, seed):
            self.step(batch)

    def accuracy(self, texts: Texts) -> float:
        """Share of texts whose label has the highest logit."""
        return self.evaluate(texts)[1]

    @torch.no_grad()
    def evaluate(self, texts: Texts, size: int = 64) -> tuple[float, float]:
        """(mean loss, accuracy)"""
        for module in self.modules:
            module.eval()
        order = sorted(range(len(texts)), key=lambda row: len(texts.ids[row]))
        loss = right = 0.0
        for at in range(0, len(order), size):
            arguments, targets = collate(texts, order[at : at + size])
            logits = self.logits(**arguments)
            loss += functional.cross_entropy(logits, targets, reduction="sum").item()
            right += (logits.argmax(-1) == targets).sum().item()
        return loss / len(texts), right / len(texts)
