"""Fused forward of bitsandbytes' 4-bit layers, by class swap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

from fusetune import ops
from fusetune.integrations._bnb_packing import is_packed, unpack
from fusetune.integrations._guards import KERNEL_DTYPES, call_reason, carrier, no_kernel
from fusetune.quantized_weight import QuantizedWeight

_CACHE = "_fusetune_weight"
_REFUSAL = "_fusetune_refusal"


class Linear4bit(bnb.nn.Linear4bit):
    """`bnb.nn.Linear4bit` that multiplies by the packed weight.

    Sums are taken in fp32 whatever `compute_dtype` says, and the input is not rounded to it; the
    output has the input's dtype, as bitsandbytes' has. Unlike bitsandbytes' on a CPU with
    AVX512-BF16 it never repacks the weight at inference, which rounds its statistics for good and
    cuts the gradient of a later training step. Where that has happened before, `fuse` undoes the
    layout; the rounding stays.

    The class has bitsandbytes' name because PEFT's DoRA asks for it.
    """

    stock_class = bnb.nn.Linear4bit
    method = "4-bit linear"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N], as `bnb.nn.Linear4bit.forward`."""
        weight = self.fused_weight()
        device = x.device.type
        if (
            isinstance(weight, str)
            or call_reason(x) is not None
            or not dtype_fits(x, device)
            or no_kernel("linear_4bit", device, x.dtype)
        ):
            return super().forward(x)
        return ops.linear_4bit(x, weight, self._parameters.get("bias"))

    def restore_layout(self) -> list[Callable[[], None]]:
        """Undoes bitsandbytes' repacking, where it can be done exactly; `fuse` calls it.

        Returns what repacks the weight: a function, or none where nothing was changed.
        """
        self.__dict__.pop(_REFUSAL, None)
        param = self._parameters["weight"]
        if type(param) is not bnb.nn.Params4bit or not is_packed(param):
            return []
        done = unpack(param)
        if not isinstance(done, str):
            return [done]
        self.__dict__[_REFUSAL] = done
        return []

    def fused_weight(self) -> QuantizedWeight | str:
        """The weight as the kernels take it, sharing storage, or the reason why they cannot.

        Raises ValueError where the weight is corrupt.
        """
        param: Any = self._parameters["weight"]
        known = self.__dict__.get(_CACHE)
        if known is not None and known[0] is param and _unchanged(param, known[1]):
            return known[1]
        if torch.compiler.is_compiling():
            return "the weight changed since fuse()"
        self.__dict__.pop(_CACHE, None)
        if type(param) is not bnb.nn.Params4bit:
            return f"the weight is a {type(param).__name__}"
        if param.is_meta:
            return "the weight is on the meta device"
        state = param.quant_state
        if state is None:
            return "the weight is not quantised yet"
        if is_packed(param):
            again = "bitsandbytes repacked the weight at inference: call fuse() again"
            return self.__dict__.get(_REFUSAL, again)
        weight = QuantizedWeight.from_bnb(param)
        if weight.shape != (self.out_features, self.in_features):
            return f"the weight was quantised from shape {tuple(weight.shape)}"
        self.__dict__[_CACHE] = (param, weight)
        return weight

    def fused_reason(self) -> str | None:
        """Why the layer, in its present state, runs bitsandbytes' forward; None if fused."""
        weight = self.fused_weight()
        return weight if isinstance(weight, str) else self.fused_carrier()[1]

    def fused_carrier(self) -> tuple[str, str | None]:
        """(backend, reason against it) for an fp32 input on the weight's device."""
        return carrier("linear_4bit", self.weight.device.type, torch.float32)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles must not carry the cache: they would hold a second packed weight.
        return {key: value for key, value in self.__dict__.items() if key != _CACHE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.fused_weight()


def _unchanged(param: Any, weight: QuantizedWeight) -> bool:
    """Whether the cached weight still is the parameter's: it may be moved or repacked in place."""
    state = param.quant_state
    if state is None or state.absmax is not weight.absmax:
        return False
    return torch.compiler.is_compiling() or param.data_ptr() == weight.packed.data_ptr()


def dtype_fits(x: torch.Tensor, device: str) -> bool:
    """Whether the fused layer gives back the dtype that the stock one does."""
    if x.dtype not in KERNEL_DTYPES:
        return False
    if not torch.is_autocast_enabled(device):
        return True
    return x.dtype in (torch.float32, torch.get_autocast_dtype(device))


SWAPS: dict[type[nn.Module], type[nn.Module]] = {bnb.nn.Linear4bit: Linear4bit}
