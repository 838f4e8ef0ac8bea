"""Argument checks shared by the ops. Messages say what was given and what is accepted.

The hot paths test one combined condition and call these only to say what is wrong.
"""

from __future__ import annotations

import torch

from fusetune.quantized_weight import QuantizedWeight

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def check_float(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def check_device(name: str, tensor: torch.Tensor, x: torch.Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move one of them")


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def check_optional(name: str, tensor: torch.Tensor | None, n: int, x: torch.Tensor) -> None:
    """A bias-like vector of n elements, or None."""
    if tensor is None:
        return
    check_float(name, tensor)
    check_shape(name, tensor, (n,))
    check_device(name, tensor, x)


def check_x(x: torch.Tensor, k: int) -> None:
    check_float("x", x)
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x must have shape [..., {k}], got {list(x.shape)}")


def check_weight(weight: torch.Tensor | QuantizedWeight) -> tuple[int, int]:
    """Its shape [N, K]: a matrix, a tensor or a QuantizedWeight."""
    if not isinstance(weight, torch.Tensor | QuantizedWeight):
        raise TypeError(
            f"weight must be a tensor or a QuantizedWeight, got {type(weight).__name__}"
        )
    if len(weight.shape) != 2:
        raise ValueError(f"weight must be a matrix [N, K], got shape {list(weight.shape)}")
    if isinstance(weight, torch.Tensor):
        check_float("weight", weight)
    n, k = weight.shape
    return n, k


def check_layer(
    x: torch.Tensor, weight: torch.Tensor | QuantizedWeight, grad: bool
) -> tuple[int, int]:
    """The shape [N, K] of a frozen weight, which fits x [..., K]."""
    n, k = check_weight(weight)
    check_x(x, k)
    if grad and isinstance(weight, torch.Tensor) and weight.requires_grad:
        raise ValueError("weight requires grad, but it is treated as frozen: detach it")
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, x on {x.device}: move one of them")
    return n, k


def check_update(
    weight: torch.Tensor | QuantizedWeight, lora_A: torch.Tensor, lora_B: torch.Tensor
) -> None:
    """weight [N, K], a tensor or a QuantizedWeight, lora_A [r, K], lora_B [N, r]."""
    n, k = check_weight(weight)
    check_float("lora_A", lora_A)
    check_float("lora_B", lora_B)
    if lora_A.dim() != 2 or lora_A.shape[1] != k:
        raise ValueError(f"lora_A must have shape [r, {k}], got {list(lora_A.shape)}")
    check_shape("lora_B", lora_B, (n, lora_A.shape[0]))
    check_device("lora_B", lora_B, lora_A)
    if weight.device != lora_A.device:
        raise ValueError(f"weight is on {weight.device}, lora_A on {lora_A.device}")


def check_quantized(w: QuantizedWeight, x: torch.Tensor) -> None:
    if not isinstance(w, QuantizedWeight):
        raise TypeError(f"w must be a QuantizedWeight, got {type(w).__name__}")
    if len(w.shape) != 2:
        raise ValueError(f"w must be a matrix [N, K], got shape {list(w.shape)}")
    if w.device != x.device:
        raise ValueError(f"w is on {w.device}, x on {x.device}: move one of them")
