"""Arguments of ops with LoRA adapters: what fits, and a tensor for a scaling."""

from __future__ import annotations

import torch

from fusetune.ops import _check
from fusetune.ops._weight import Weight

Tensor = torch.Tensor


def any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def fold_scaling(
    scaling: Tensor, x: Tensor, lora_B: Tensor, lora_bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Moves a tensor scaling into the small lora_B and lora_bias: the host never reads it."""
    if scaling.dim():
        raise ValueError(f"scaling must be a number or a 0-d tensor, got shape {[*scaling.shape]}")
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    return lora_B.to(acc) * scaling, None if lora_bias is None else lora_bias.to(acc) * scaling


def check_arguments(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    lora_bias: Tensor | None,
    dropout_p: float,
    grad: bool,
) -> None:
    n, k = _check.check_layer(x, weight, grad)
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B)):
        _check.check_float(name, tensor)
        if tensor.dim() != 2:
            raise ValueError(f"{name} must be a matrix, got shape {list(tensor.shape)}")
        _check.check_device(name, tensor, x)
    r = lora_A.shape[0]
    if lora_A.shape[1] != k or r == 0:
        raise ValueError(f"lora_A must have shape [r, {k}] with r > 0, got {list(lora_A.shape)}")
    if lora_B.shape[0] != n or lora_B.shape[1] != r:
        raise ValueError(f"lora_B must have shape [{n}, {r}], got {list(lora_B.shape)}")
    _check.check_optional("bias", bias, n, x)
    _check.check_optional("lora_bias", lora_bias, n, x)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")
