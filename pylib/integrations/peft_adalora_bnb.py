"""Fused forward of PEFT's AdaLoRA over bitsandbytes' 4-bit layers, by class swap."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.adalora.bnb import SVDLinear4bit
from torch import nn

from fusetune.integrations._guards import call_reason, carrier, module_reason, no_kernel
from fusetune.integrations.bitsandbytes import Linear4bit, dtype_fits
from fusetune.integrations.peft import Call, fused_linear
from fusetune.integrations.peft_adalora import (
    SvdAdapter,
    active_adapter,
    freeze_ranknum,
    release_ranknum,
)


class FusedSVDLinear4bit(SVDLinear4bit):
    """`adalora.bnb.SVDLinear4bit` in one fused op.

    Where the adapter cannot be fused PEFT's forward runs, with the fused 4-bit matmul of the base.
    """

    stock_class = SVDLinear4bit
    method = "AdaLoRA 4-bit"

    def after_fuse(self) -> None:
        """After the class was swapped in, and when `fuse` comes again."""
        freeze_ranknum(self)

    def before_unfuse(self) -> None:
        """Before it is swapped out."""
        release_ranknum(self)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., K] -> [..., N], as `adalora.bnb.SVDLinear4bit.forward`."""
        if args or kwargs:
            return super().forward(x, *args, **kwargs)
        adapter = self._fused_adapter()
        if isinstance(adapter, str) or call_reason(x) is not None:
            return super().forward(x)
        base: Any = self._modules["base_layer"]
        weight = base.fused_weight()
        if (
            isinstance(weight, str)
            or not dtype_fits(x, x.device.type)
            or not (self.cast_input_dtype_enabled or x.dtype == adapter.lora_A.dtype)
            or no_kernel("lora_linear", x.device.type, x.dtype)
        ):
            return super().forward(x)
        call = Call(x.dtype, weight, base._parameters.get("bias"), adapter.folded())
        return fused_linear(self, x, call)

    def _fused_adapter(self) -> SvdAdapter | str:
        base: Any = self._modules["base_layer"]
        return module_reason(base, "base_layer", Linear4bit) or active_adapter(self)

    def fused_reason(self) -> str | None:
        """Why the layer, in its present state, runs PEFT's forward; None where it is fused."""
        adapter = self._fused_adapter()
        if isinstance(adapter, str):
            return adapter
        base: Any = self._modules["base_layer"]
        weight = base.fused_weight()
        return weight if isinstance(weight, str) else self.fused_carrier()[1]

    def fused_carrier(self) -> tuple[str, str | None]:
        """(backend, reason against it) for an fp32 input on the weight's device."""
        return carrier("lora_linear", self.weight.device.type, torch.float32)


SWAPS: dict[type[nn.Module], type[nn.Module]] = {SVDLinear4bit: FusedSVDLinear4bit}
