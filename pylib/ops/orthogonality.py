"""orthogonality: mean of || P P^T - I ||_F over many small matrices, a batch for each shape.

Kept for the backward pass are the matrices themselves (by reference) and their deviations [r, r]:
d || P P^T - I || / dP = 2 (P P^T - I) / || P P^T - I || P.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fusetune.ops import _check
from fusetune.ops._registry import plain
from fusetune.reference import orthogonality as reference
from fusetune.reference.linear_4bit import accumulate_dtype

Tensor = torch.Tensor


def orthogonality(rows: Sequence[Tensor], columns: Sequence[Tensor] = ()) -> Tensor:
    """How far matrices are from having orthonormal rows or columns; AdaLoRA's regulariser.

    rows: matrices [r, K]; columns: matrices [N, r]; at least one in all, of any sizes and float
    dtypes, on one device. Returns the mean of || P P^T - I ||_F and || P^T P - I ||_F, in fp32
    (float64 where one is float64) whatever autocast says. Differentiable, once, in all of them;
    the gradient of a norm that is zero is zero.

    Raises TypeError or ValueError, naming the argument, for what is no such matrix. Source: Zhang
    et al. 2023, arXiv:2303.10512, equation (4), as PEFT computes it: not squared, and the mean.
    """
    matrices = [*rows, *columns]
    _check_arguments(rows, columns)
    with torch.autocast(matrices[0].device.type, enabled=False):
        if torch.compiler.is_compiling() or not all(map(plain, matrices)):
            return reference.orthogonality(rows, columns)
        value: Tensor = _Orthogonality.apply(len(rows), *matrices)
        return value


def _check_arguments(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> None:
    first = None
    for argument, given in (("rows", rows), ("columns", columns)):
        for i, matrix in enumerate(given):
            name = f"{argument}[{i}]"
            _check.check_float(name, matrix)
            if matrix.dim() != 2:
                raise ValueError(f"{name} must be a matrix, got shape {list(matrix.shape)}")
            first = matrix if first is None else first
            if matrix.device != first.device:
                raise ValueError(
                    f"{name} is on {matrix.device}, the first one on {first.device}: move one"
                )
    if first is None:
        raise ValueError("rows and columns are both empty: there must be one matrix at least")


def _groups(rows: int, matrices: Sequence[Tensor]) -> list[tuple[bool, list[int]]]:
    """(whether they are of the columns, positions) of the matrices of each shape and dtype."""
    found: dict[Any, list[int]] = {}
    for i, matrix in enumerate(matrices):
        found.setdefault((i >= rows, matrix.shape, matrix.dtype), []).append(i)
    return [(key[0], positions) for key, positions in found.items()]


def _stacked(matrices: Sequence[Tensor], positions: list[int], transposed: bool) -> Tensor:
    """[n, r, K] in the dtype of the sums."""
    stack = torch.stack([matrices[i] for i in positions])
    stack = stack.to(accumulate_dtype(stack.dtype))
    return stack.mT if transposed else stack


class _Orthogonality(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: int, *matrices: Tensor) -> Tensor:
        kept, norms = [], []
        for transposed, positions in _groups(rows, matrices):
            stack = _stacked(matrices, positions, transposed)
            deviation = stack @ stack.mT
            deviation.diagonal(dim1=1, dim2=2).sub_(1)
            norm = torch.linalg.matrix_norm(deviation)
            kept += [deviation, norm]
            norms.append(norm)
        ctx.rows = rows
        ctx.save_for_backward(*matrices, *kept)
        return torch.cat(norms).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dvalue: Tensor) -> tuple[Tensor | None, ...]:
        n = len(ctx.needs_input_grad) - 1
        matrices, kept = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        grads: list[Tensor | None] = [None] * n
        for group, (transposed, positions) in enumerate(_groups(ctx.rows, matrices)):
            if not any(ctx.needs_input_grad[1 + i] for i in positions):
                continue
            deviation, norm = kept[2 * group : 2 * group + 2]
            factor = torch.where(norm == 0, 0, 2 / n * dvalue / norm)
            part = (deviation * factor[:, None, None]) @ _stacked(matrices, positions, transposed)
            part = (part.mT if transposed else part).to(matrices[positions[0]].dtype)
            for i, grad in zip(positions, part.unbind(), strict=True):
                grads[i] = grad if ctx.needs_input_grad[1 + i] else None
        return None, *grads
