"""Fused forward of PEFT's LoRA over bitsandbytes' 4-bit layers, by class swap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import nn

from fusetune.integrations._guards import call_reason, carrier, module_reason, no_kernel
from fusetune.integrations._lora_adapters import Adapter, Several, active_adapter
from fusetune.integrations.bitsandbytes import Linear4bit, dtype_fits
from fusetune.integrations.peft import (
    Call,
    fused_linear,
    miscounts,
    present_method,
    present_op,
)


class FusedLinear4bit(PeftLinear4bit):
    """`lora.bnb.Linear4bit` in one fused op.

    Where the adapters cannot be fused (another variant, hooks, ...) PEFT's forward runs,
    with the fused 4-bit matmul of the base layer.
    """

    stock_class = PeftLinear4bit
    method = "LoRA 4-bit"

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., K] -> [..., N], as `lora.bnb.Linear4bit.forward`."""
        names = kwargs.get("adapter_names")
        if args or len(kwargs) > (names is not None):  # alora_offsets
            return super().forward(x, *args, **kwargs)
        call = self.fused_call(x, names)
        return super().forward(x, **kwargs) if call is None else fused_linear(self, x, call)

    def fused_call(self, x: torch.Tensor, names: Sequence[str] | None = None) -> Call | None:
        """What is fused of a call with x, under adapter_names; None: PEFT's forward has to run."""
        adapter = self._fused_adapter(names)
        if isinstance(adapter, str) or call_reason(x) is not None or miscounts(x, names):
            return None
        base: Any = self._modules["base_layer"]
        weight = base.fused_weight()
        device = x.device.type
        if (
            isinstance(weight, str)
            or not dtype_fits(x, device)
            or not (self.cast_input_dtype_enabled or x.dtype == adapter.lora_A.dtype)
            or no_kernel(adapter.op, device, x.dtype)
            or (adapter.magnitude is not None and widens(x))
        ):
            return None
        return Call(x.dtype, weight, base._parameters.get("bias"), adapter)

    def _fused_adapter(self, names: Sequence[str] | None = None) -> Adapter | Several | str:
        base: Any = self._modules["base_layer"]
        return module_reason(base, "base_layer", Linear4bit) or active_adapter(self, names)

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
        return carrier(present_op(self), self.weight.device.type, torch.float32)

    @property
    def present_method(self) -> str:
        """LoRA or DoRA, for the report."""
        return present_method(self, self.method)


def widens(x: torch.Tensor) -> bool:
    """Whether PEFT's DoRA gives fp32 for a 16-bit x: it does not convert back under autocast."""
    return torch.is_autocast_enabled() and x.dtype != torch.float32


SWAPS: dict[type[nn.Module], type[nn.Module]] = {PeftLinear4bit: FusedLinear4bit}
