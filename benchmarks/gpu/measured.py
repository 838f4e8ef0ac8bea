"""What a case is made of, and what all of them share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fusetune.bench.timing import Run

SCALING = 2.0
RANKS, DROPOUTS, ROWS = (16, 8, 64), (0.0, 0.1), (4096, 16, 1, 64, 256, 1024)
Shape = tuple[int, int]  # N, K
ONE: list[list[Shape]] = [[(4096, 4096)]]


@dataclass
class Measured:
    """A case. `runs`: ours first.

    exact: float64, or None where that would not fit. random: each contender has its own dropout.
    """

    runs: dict[str, Run]
    exact: Run | None = None
    tolerance: float = 0.0
    random: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


Entry = tuple[str, Callable[[], Measured]]  # key, and what makes it


def half_dtype() -> torch.dtype:
    """bfloat16, or float16 where the card has no matmuls in it."""
    old = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
    return torch.float16 if old else torch.bfloat16


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().requires_grad_()
