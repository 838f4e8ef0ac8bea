"""Fused forward of PEFT's AdaLoRA over bitsandbytes' 4-bit layers, by class swap."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.adalora.bnb import SVDLinear4bit
from torch import nn

from fusetune.integrations._guards import carrier, module_reason, no_kernel
from fusetune.integrations.bitsandbytes import Linear4bit, dtype_fits
from fusetune.integrations.peft_adalora import FusedSVD
from fusetune.quantized_weight import QuantizedWeight


class FusedSVDLinear4bit(FusedSVD, SVDLinear4bit):
    """`adalora.bnb.SVDLinear4bit` in one fused op.

    Where the adapter cannot be fused PEFT's forward runs, with the fused 4-bit matmul of the base.
    """

    stock_class = SVDLinear4bit
    method = "AdaLoRA 4-bit"

    def _base_reason(self) -> str | None:
        base: Any = self._modules["base_layer"]
        return module_reason(base, "base_layer", Linear4bit)

    def _weight(self) -> QuantizedWeight | str:
        base: Any = self._modules["base_layer"]
        weight: QuantizedWeight | str = base.fused_weight()
        return weight

    def _dtype(
        self, x: torch.Tensor, weight: QuantizedWeight, adapter: torch.dtype
    ) -> torch.dtype | None:
        fits = dtype_fits(x, x.device.type) and (
            self.cast_input_dtype_enabled or x.dtype == adapter
        )
        return None if not fits or no_kernel("lora_linear", x.device.type, x.dtype) else x.dtype

    def fused_carrier(self) -> tuple[str, str | None]:
        """(backend, reason against it) for an fp32 input on the weight's device."""
        return carrier("lora_linear", self.weight.device.type, torch.float32)


SWAPS: dict[type[nn.Module], type[nn.Module]] = {SVDLinear4bit: FusedSVDLinear4bit}
