"""Cases of importance, against PyTorch's operators one matrix at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fusetune import ops
from fusetune.reference import importance as reference

from .cases import NAMES
from .timing import Case, Result, Run

Tensor = torch.Tensor


def importance(shapes: list[tuple[int, int]], dim: int, dtype: torch.dtype) -> Case:
    """The scores and both averages of matrices of these shapes, by row (dim 1) or column (0)."""
    sets = [[torch.randn(*shape).to(dtype) for shape in shapes] for _ in range(4)]
    weights, grads = sets[:2]
    kept = [[each.abs() for each in tensors] for tensors in sets[2:]]

    def all_of(function: Callable[..., Tensor], dtype: torch.dtype) -> Run:
        def run() -> Result:
            w, g = ([each.to(dtype) for each in tensors] for tensors in (weights, grads))
            s, u = ([each.to(dtype, copy=True) for each in tensors] for tensors in kept)
            scores = function(w, g, s, u, 0.85, 0.9, dim)
            return scores, *(torch.cat([each.flatten() for each in of]) for of in (s, u))

        return run

    def exact(*given: Any) -> Tensor:
        return reference.importance(reference.Given(*given))

    return Case(
        op="importance",
        name=f"of {'columns' if dim == 0 else 'rows'} {NAMES[dtype]}",
        shape=f"{len(shapes)} of {shapes[0][0]} × {shapes[0][1]}",
        ours=all_of(ops.importance, dtype),
        peers={"torch": all_of(exact, dtype)},
        exact=all_of(exact, torch.float64),
        # An average takes four operations that round, and so does a score.
        tolerance=8 * torch.finfo(dtype).eps,
    )
