"""importance: AdaLoRA's moving averages of |w dw| and the scores made of them, for all at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusetune.ops import _check, _cpu
from fusetune.ops._registry import Impl, Op
from fusetune.reference import importance as reference
from fusetune.reference.importance import Given

Tensor = torch.Tensor
Tensors = Sequence[Tensor]


@torch.no_grad()
def importance(
    weights: Tensors,
    grads: Tensors | None,
    sensitivity: Tensors,
    uncertainty: Tensors,
    beta1: float,
    beta2: float,
    dim: int,
) -> Tensor:
    """The importance of the rows (dim 1) or columns (dim 0) of many matrices, by AdaLoRA.

    All four are of one length, their matrices at one place of one shape [rows, cols], one float
    dtype and device. sensitivity and uncertainty, moving averages with the factors beta1 and
    beta2 in (0, 1), change in place; with grads None they stay, and weights are not read.
    Returns the means of sensitivity times uncertainty over `dim`, of all matrices one after the
    other, in fp32 or their dtype.

    Not differentiable. Raises TypeError or ValueError, naming the argument, for what does not
    fit. Source: Zhang et al. 2023, arXiv:2303.10512, equations (8) to (11); the averages are
    PEFT's bit for bit.
    """
    given = Given(weights, grads, sensitivity, uncertainty, beta1, beta2, dim)
    _check_arguments(given)
    run = OP.run(weights[0].device.type, weights[0].dtype, None)
    scores: Tensor = run(given)
    return scores


def _check_arguments(given: Given) -> None:
    weights = given.weights
    if not weights:
        raise ValueError("weights is empty: there must be one matrix at least")
    for name, beta in (("beta1", given.beta1), ("beta2", given.beta2)):
        if not 0 < beta < 1:
            raise ValueError(f"{name} must be between 0 and 1, got {beta}")
    if given.dim not in (0, 1):
        raise ValueError(f"dim must be 0 or 1, got {given.dim}")
    _check.check_float("weights[0]", weights[0])
    dtype, device = weights[0].dtype, weights[0].device
    shapes = [weight.shape for weight in weights]
    if any(len(shape) != 2 for shape in shapes):
        raise ValueError("weights must be matrices")
    for name, tensors in zip(Given._fields[:4], given[:4], strict=True):
        if tensors is None:
            continue
        if [each.shape for each in tensors] != shapes:
            raise ValueError(f"{name} must have the {len(shapes)} shapes of weights")
        if {each.dtype for each in tensors} != {dtype} or not _all_on(device, tensors):
            raise TypeError(f"{name} must all be {dtype} on {device}, as weights[0]")


def _all_on(device: torch.device, tensors: Tensors) -> bool:
    if device.type == "cpu":  # half the time of a comparison, for hundreds in every step
        return {each.is_cpu for each in tensors} == {True}
    return {each.device for each in tensors} == {device}


def _on_cpu(given: Given) -> Tensor:
    weights, grads, sensitivity, uncertainty, beta1, beta2, dim = given
    lists = [weights, weights if grads is None else grads, sensitivity, uncertainty]
    fits = weights[0].dtype == torch.float32
    if not fits or not all(all(map(torch.Tensor.is_contiguous, tensors)) for tensors in lists):
        return _foreach(given)
    addresses = [[each.data_ptr() for each in tensors] for tensors in lists]
    if grads is None:
        addresses[1] = [0] * len(weights)
    shapes = [each.shape for each in weights]
    rows, cols = zip(*shapes, strict=True)
    scores = _cpu.empty(sum(cols if dim == 0 else rows), dtype=torch.float32)
    matrices = list(zip(*addresses, rows, cols, strict=True))
    _cpu.kernels().importance(matrices, beta1, beta2, dim == 0, scores.data_ptr())
    return scores


def _foreach(given: Given) -> Tensor:
    """A launch for each operation of the update, and one for the scores of each shape."""
    weights, grads, sensitivity, uncertainty, beta1, beta2, dim = given
    if grads is not None:
        current = torch._foreach_mul(list(weights), list(grads))
        torch._foreach_abs_(current)
        _decay(list(sensitivity), torch._foreach_mul(current, 1 - beta1), beta1)
        torch._foreach_sub_(current, list(sensitivity))
        torch._foreach_abs_(current)
        _decay(list(uncertainty), torch._foreach_mul(current, 1 - beta2), beta2)
    shapes: dict[torch.Size, list[int]] = {}
    for i, each in enumerate(sensitivity):
        shapes.setdefault(each.shape, []).append(i)
    scores: list[Tensor] = [sensitivity[0]] * len(sensitivity)
    for positions in shapes.values():
        s, u = (torch.stack([of[i] for i in positions]) for of in (sensitivity, uncertainty))
        for i, mean in zip(positions, s.mul_(u).mean(1 + dim).unbind(), strict=True):
            scores[i] = mean
    return torch.cat(scores)


def _decay(average: list[Tensor], addend: Sequence[Tensor], beta: float) -> None:
    # Not in place: torch's product in place rounds 16-bit numbers otherwise on the CPU.
    decayed = torch._foreach_mul(average, beta)
    torch._foreach_add_(decayed, list(addend))
    torch._foreach_copy_(average, decayed)


OP = Op(
    "importance",
    Impl("cpu", _on_cpu, _cpu.supports("importance"), 10),
    Impl("torch", _foreach, lambda case: None, 5),
    Impl("reference", reference.importance, lambda case: None, 0),
)
