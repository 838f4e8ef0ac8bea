"""multi_lora_linear: a linear layer with a frozen W under several LoRA adapters at once.

For the backward pass x itself (by reference), every s_i = drop_i(x) A_i^T (fp32, of the rows that
adapter i serves) and the dropouts' seeds are kept, and nothing else of the size of an activation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusetune.ops import _check
from fusetune.ops._lora_arguments import check_arguments
from fusetune.ops._multi_lora_linear import apply
from fusetune.ops._weight import Weight
from fusetune.ops.lora_linear import lora_linear
from fusetune.reference.dropout import new_seed

Tensor = torch.Tensor


def multi_lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float | Tensor],
    *,
    adapter_of: Sequence[int] | None = None,
    bias: Tensor | None = None,
    lora_bias: Sequence[Tensor | None] | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
) -> Tensor:
    """A linear layer with several LoRA adapters (Hu et al. 2021, arXiv:2106.09685), as in PEFT:

        y = x W^T + bias + sum_i scaling_i (drop_i(x) A_i^T B_i^T + lora_bias_i)

    over all adapters (PEFT's several active ones), or, with `adapter_of`, over the one that
    adapter_of[b] names for x[b] (PEFT's `adapter_names`); -1: none.

    x: [..., K], with adapter_of [B, ..., K]; weight: [N, K], a tensor or a `QuantizedWeight`,
    frozen; lora_A: a [r_i, K] for each adapter; lora_B: [N, r_i]; scaling: numbers or 0-d tensors;
    bias: [N]; lora_bias: for each adapter [N] or None. Ranks may differ. All float16, bfloat16,
    float32 or float64, not necessarily the same. dropout_p: one for all, or one each; every
    adapter has a mask of its own, with a seed from torch's generator.
    Returns y [..., N] in x's dtype; sums are taken in fp32 (float64 for a float64 x).

    Differentiable, once, in x, every lora_A, lora_B, lora_bias and tensor scaling, and in bias.
    Raises TypeError or ValueError, naming the argument, for shapes, dtypes, devices or values that
    do not fit, and for a weight that requires grad.
    """
    count = len(lora_A)
    _check_lengths(count, lora_B=lora_B, scaling=scaling)
    if lora_bias is not None:
        _check_lengths(count, lora_bias=lora_bias)
    if isinstance(dropout_p, float | int):
        dropout_p = [float(dropout_p)] * count
    _check_lengths(count, dropout_p=dropout_p)
    _check_adapters(x, weight, lora_A, lora_B, bias, lora_bias, dropout_p)
    if adapter_of is not None:
        adapter_of = _checked_rows(adapter_of, count, x)
    numbers = [_number(scale) for scale in scaling]
    biases = _scaled_biases(lora_bias, scaling, x, weight.shape[0])
    if any(isinstance(scale, Tensor) for scale in scaling):
        lora_B = [_folded(b, scale, x) for b, scale in zip(lora_B, scaling, strict=True)]
    dropped = training and any(dropout_p)
    seeds = new_seed(x.device, count) if dropped else None
    chances = [float(p) for p in dropout_p] if dropped else [0.0] * count
    if stacks(x.device, adapter_of is not None, dropped):
        return _stacked(x, weight, lora_A, lora_B, numbers, bias, biases)
    return apply(x, weight, lora_A, lora_B, numbers, adapter_of, bias, biases, chances, seeds)


def stacks(device: torch.device, by_row: bool, dropped: bool) -> bool:
    """Whether `lora_linear` carries the op out, as one adapter of all the ranks.

    It can where all rows have all adapters and there is no dropout, of which each has a mask of its
    own. The CPU has kernels that need no stacking.
    """
    return device.type != "cpu" and not by_row and not dropped


def _stacked(
    x: Tensor,
    weight: Weight,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    bias: Tensor | None,
    lora_bias: Tensor | None,
) -> Tensor:
    scaled = [b.to(_acc(x)) * scale for b, scale in zip(lora_B, scaling, strict=True)]
    summed = None if lora_bias is None else lora_bias.sum(0)
    all_a, all_b = torch.cat(list(lora_A)), torch.cat(scaled, 1)
    return lora_linear(x, weight, all_a, all_b, 1.0, bias=bias, lora_bias=summed)


def _check_lengths(count: int, **lists: Sequence[object]) -> None:
    for name, given in lists.items():
        if isinstance(given, str) or not hasattr(given, "__len__"):
            raise TypeError(f"{name} must have an entry for each adapter, got {given!r}")
        if len(given) != count:
            raise ValueError(
                f"{name} must have an entry for each of the {count} adapters of lora_A, "
                f"got {len(given)}"
            )


def _check_adapters(
    x: Tensor,
    weight: Weight,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    bias: Tensor | None,
    lora_bias: Sequence[Tensor | None] | None,
    dropout_p: Sequence[float],
) -> None:
    grad = torch.is_grad_enabled()
    if not lora_A:
        raise ValueError("lora_A must have at least one adapter")
    first_bias = None if lora_bias is None else lora_bias[0]
    check_arguments(x, weight, lora_A[0], lora_B[0], bias, first_bias, dropout_p[0], grad)
    n, k = weight.shape
    for i in range(1, len(lora_A)):
        a, b = lora_A[i], lora_B[i]
        own_bias = None if lora_bias is None else lora_bias[i]
        fits = (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and own_bias is None
            and a.dtype in _check.FLOATS
            and b.dtype in _check.FLOATS
            and a.shape == (b.shape[-1], k)
            and b.shape == (n, a.shape[0])
            and a.shape[0] > 0
            and a.device == x.device == b.device
            and 0 <= dropout_p[i] <= 1
        )
        if fits:
            continue
        try:
            check_arguments(x, weight, a, b, bias, own_bias, dropout_p[i], grad)
        except (TypeError, ValueError) as error:
            raise type(error)(f"adapter {i}: {error}") from None


def _checked_rows(adapter_of: Sequence[int], count: int, x: Tensor) -> list[int]:
    if x.dim() < 2:
        raise ValueError(f"x must have shape [B, ..., K] with adapter_of, got {[*x.shape]}")
    rows = list(adapter_of)
    if len(rows) != x.shape[0]:
        raise ValueError(
            f"adapter_of must have an entry for each of the {x.shape[0]} rows of x, got {len(rows)}"
        )
    for owner in rows:
        if not isinstance(owner, int) or not -1 <= owner < count:
            raise ValueError(f"adapter_of must have entries from -1 to {count - 1}, got {owner!r}")
    return rows


def _number(scale: float | Tensor) -> float:
    if isinstance(scale, Tensor):
        if scale.dim():
            raise ValueError(f"scaling must be numbers or 0-d tensors, got shape {[*scale.shape]}")
        return 1.0  # folded into lora_B: the host never reads it
    if not isinstance(scale, float | int):
        raise TypeError(f"scaling must be numbers or 0-d tensors, got {type(scale).__name__}")
    return float(scale)


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _folded(lora_B: Tensor, scale: float | Tensor, x: Tensor) -> Tensor:
    return lora_B.to(_acc(x)) * scale if isinstance(scale, Tensor) else lora_B


def _scaled_biases(
    lora_bias: Sequence[Tensor | None] | None, scaling: Sequence[float | Tensor], x: Tensor, n: int
) -> Tensor | None:
    """[adapters, N], zeros where there is none; None where there is none at all."""
    if lora_bias is None or all(bias is None for bias in lora_bias):
        return None
    zeros = torch.zeros(n, dtype=_acc(x), device=x.device)
    return torch.stack(
        [
            zeros if bias is None else bias.to(_acc(x)) * scale
            for bias, scale in zip(lora_bias, scaling, strict=True)
        ]
    )
