"""Fused forward of PEFT's IA3 over bitsandbytes' 4-bit layers, by class swap."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.ia3.bnb import Linear4bit as PeftLinear4bit
from torch import nn

from fusetune import ops
from fusetune.integrations._guards import call_reason, carrier, module_reason, no_kernel
from fusetune.integrations.bitsandbytes import Linear4bit, dtype_fits
from fusetune.integrations.peft_ia3 import FusedIA3

Tensor = torch.Tensor


class FusedLinear4bit(FusedIA3, PeftLinear4bit):
    """`ia3.bnb.Linear4bit` in one fused op.

    Outside autocast y has x's dtype, as for a dense layer. PEFT 0.21 gives fp32 for a 16-bit x, so
    that keys and values no longer fit the queries, and attention refuses them.
    """

    stock_class = PeftLinear4bit
    method = "IA3 4-bit"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] -> [..., N], as `ia3.bnb.Linear4bit.forward`."""
        names = self.rows()
        if names is not None:
            return self._as_peft(self.by_row(x, names), x, self._any_dtype())
        scale = self._fused_scale()
        if args or kwargs or isinstance(scale, str) or call_reason(x) is not None:
            return super().forward(x, *args, **kwargs)
        base: Any = self._modules["base_layer"]
        weight = base.fused_weight()
        device = x.device.type
        if (
            isinstance(weight, str)
            or not dtype_fits(x, device)
            or no_kernel("ia3_linear", device, x.dtype)
        ):
            return super().forward(x)
        bias = base._parameters.get("bias")
        y = ops.ia3_linear(x, weight, scale, bias=bias, feedforward=self.is_feedforward)
        return self._as_peft(y, x, scale.dtype)

    def _as_peft(self, y: Tensor, x: Tensor, scale: torch.dtype) -> Tensor:
        """y in the dtype that PEFT gives under autocast: a product's, not converted back."""
        autocast = torch.is_autocast_enabled(x.device.type)
        return y.to(torch.promote_types(x.dtype, scale)) if autocast else y

    def _any_dtype(self) -> torch.dtype:
        return next(iter(self.ia3_l.values())).dtype

    def _fused_scale(self) -> Tensor | str:
        base: Any = self._modules["base_layer"]
        return module_reason(base, "base_layer", Linear4bit) or self.active_scale()

    def fused_reason(self) -> str | None:
        """Why the layer, in its present state, runs PEFT's forward; None where it is fused."""
        scale = self._fused_scale()
        if isinstance(scale, str):
            return scale
        base: Any = self._modules["base_layer"]
        weight = base.fused_weight()
        return weight if isinstance(weight, str) else self.fused_carrier()[1]

    def fused_carrier(self) -> tuple[str, str | None]:
        """(backend, reason against it) for an fp32 input on the weight's device."""
        return carrier("ia3_linear", self.weight.device.type, torch.float32)


SWAPS: dict[type[nn.Module], type[nn.Module]] = {PeftLinear4bit: FusedLinear4bit}
