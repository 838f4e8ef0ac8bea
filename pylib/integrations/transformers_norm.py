"""Fused RMS norms of transformers' models, by class swap.

They are known by their forward, see `_known_forward`. Where there is no kernel for them they are
none of ours, and the report does not mention them. In 16 bits theirs rounds twice, ours once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fusetune import ops
from fusetune.integrations import _stock_forward
from fusetune.integrations._guards import KERNEL_DTYPES, call_reason, carrier, no_kernel
from fusetune.integrations._stock_forward import KnownForward

SWAPS: dict[type[nn.Module], type[Any]] = {}


class FusedRMSNorm(KnownForward):
    """What all fused norms share; the first base of each."""

    swaps = SWAPS
    method = "rms norm"

    @staticmethod
    def _known_forward(self: Any, hidden_states: Any) -> Any:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)

    @classmethod
    def accepts(cls, module: Any) -> bool:
        """Whether a norm is one that we carry out."""
        return _reason(module) is None

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [..., N] -> [..., N], as the stock class."""
        weight = self._parameters["weight"]
        if (
            _reason(self) is not None
            or call_reason(hidden_states) is not None
            or hidden_states.dtype != weight.dtype
            or hidden_states.device != weight.device
            or hidden_states.shape[-1:] != weight.shape
            or torch.compiler.is_compiling()
        ):
            y: torch.Tensor = self.stock_class.forward(self, hidden_states)
            return y
        return ops.rms_norm(hidden_states, weight, self.variance_epsilon)

    def fused_reason(self: Any) -> str | None:
        """Why the norm, in its present state, runs the stock expression; None: it is fused."""
        return _reason(self)

    def fused_carrier(self: Any) -> tuple[str, str | None]:
        """(backend, reason against it)."""
        return carrier("rms_norm", self.weight.device.type, self.weight.dtype)


def _reason(module: Any) -> str | None:
    weight, eps = module._parameters.get("weight"), module.__dict__.get("variance_epsilon")
    if type(weight) is not nn.Parameter or hasattr(weight, "ds_id"):
        return f"the weight is not a plain parameter but {type(weight).__name__}"
    if weight.dtype not in KERNEL_DTYPES or weight.dim() != 1:
        return f"the weight is {weight.dtype} of shape {list(weight.shape)}"
    if not isinstance(eps, float):
        return f"variance_epsilon is a {type(eps).__name__}"
    if no_kernel("rms_norm", weight.device.type, weight.dtype):
        return f"no kernel for {weight.dtype} on {weight.device}"
    return None


def discover(model: nn.Module) -> None:
    """Enters the norm classes of a model in SWAPS."""
    _stock_forward.discover(model, FusedRMSNorm)
