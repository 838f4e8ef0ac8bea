"""What a training run consists of, saved and restored to the bit.

Batches are a function of (seed, step), so the step counter is the whole position in the data.
Adapters, optimiser and random state are small; writing them after every step costs a few per cent.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch

State = dict[str, Any]


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def snapshot(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Adapters, optimiser and random state, as live references: copy or save before going on."""
    return {
        "adapter": {name: p.data for name, p in trainable(model).items()},
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore(state: State, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        for name, p in trainable(model).items():
            p.copy_(state["adapter"][name])
    optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it would share the tensors
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"]:
        torch.cuda.set_rng_state_all(state["cuda_rng"])


def save(path: Path, state: State) -> None:
    """Atomic: a kill at any moment leaves the old file or the new one, never half of one."""
    scratch = path.with_suffix(".tmp")
    torch.save(state, scratch)
    os.replace(scratch, path)


def load(path: Path) -> State:
    """Raises: ValueError when there is no readable checkpoint at `path`."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise ValueError(f"resume: no checkpoint at {path}") from None
    except Exception as error:  # torch.load raises whatever zipfile or pickle raise on damage
        raise ValueError(f"resume: {path} is not a readable checkpoint: {error}") from error
