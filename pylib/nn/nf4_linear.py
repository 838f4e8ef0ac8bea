"""A linear layer whose frozen weight is kept in 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fusetune.ops.dequantize_4bit import dequantize_4bit
from fusetune.ops.linear_4bit import linear_4bit
from fusetune.ops.quantize_4bit import quantize_4bit
from fusetune.quantized_weight import QuantizedWeight


class NF4Linear(nn.Module):
    """y = x W^T + bias with W [out_features, in_features] quantised to NF4 (or FP4), frozen.

    weight: a `QuantizedWeight`, no parameter: optimisers do not see it, `.to(device)` moves it,
    `.to(dtype)` leaves it alone. bias: [out_features] or None.

    State dicts have the keys and contents of bitsandbytes' Linear4bit, so that checkpoints go both
    ways.
    """

    def __init__(self, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> None:
        """Raises ValueError where the weight is no matrix or the bias does not fit it."""
        super().__init__()
        if len(weight.shape) != 2:
            raise ValueError(f"weight must be a matrix [N, K], got shape {list(weight.shape)}")
        if bias is not None and tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias.detach(), bias.requires_grad)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = False,
    ) -> NF4Linear:
        """Quantises an nn.Linear; its bias is shared. Options as `ops.quantize_4bit`."""
        weight = quantize_4bit(
            linear.weight, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant
        )
        return cls(weight, linear.bias)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear_4bit(x, self.weight, self.bias)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense weight."""
        return dequantize_4bit(self.weight, dtype)

    def extra_repr(self) -> str:
        return f"{self.weight!r}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> NF4Linear:
        super()._apply(fn, recurse)
        self.weight = self.weight.to(fn(self.weight.packed).device)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, tensor in self.weight.state_dict().items():
            destination[prefix + key] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = f"{prefix}weight"
        found = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(own)}
        rest = {k: v for k, v in state_dict.items() if not k.startswith(own)}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not found:
            missing_keys.append(own)
            return
        try:
            loaded = QuantizedWeight.from_state_dict(found).to(self.weight.device)
        except ValueError as error:
            error_msgs.append(f"{own}: {error}")
            return
        if loaded.shape != self.weight.shape:
            error_msgs.append(
                f"{own}: shape {list(loaded.shape)} in the checkpoint, "
                f"{list(self.weight.shape)} in the model"
            )
            return
        self.weight = loaded
