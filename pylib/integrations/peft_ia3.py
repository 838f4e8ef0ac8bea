"""Fused forward of PEFT's IA3, by class swap, and adapters by row, which PEFT's IA3 ignores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners import ia3
from torch import nn

from fusetune import ops
from fusetune.integrations._guards import (
    KERNEL_DTYPES,
    call_reason,
    carrier,
    linear_reason,
    no_kernel,
)
from fusetune.nn.adapter_rows import ROWS, check_rows, heads_by_row, rows_named, vectors

Tensor = torch.Tensor


class FusedIA3:
    """What the fused layers share; the first base of each."""

    stock_class: type[nn.Module]
    method: str

    def active_scale(self: Any) -> Tensor | str:
        """The product of the active adapters' vectors, or why PEFT has to carry it out."""
        if self._disable_adapters:
            return "adapters are disabled"
        if self.merged_adapters:
            return "the adapter is merged"
        held = self._modules["ia3_l"]
        names = [name for name in self.active_adapters if name in held]
        if not names:
            return "no active adapter"
        scales = [held[name] for name in names]
        for name, scale in zip(names, scales, strict=True):
            if type(scale) is not nn.Parameter or hasattr(scale, "ds_id"):
                return f"ia3_l[{name!r}] is not a plain parameter but {type(scale).__name__}"
        if len({scale.dtype for scale in scales}) > 1 or scales[0].dtype not in KERNEL_DTYPES:
            return f"the vectors are {', '.join(str(scale.dtype) for scale in scales)}"
        product: Tensor = scales[0].flatten()
        for scale in scales[1:]:
            product = product * scale.flatten()
        return product

    def by_row(self: Any, x: Tensor, adapter_names: Any) -> Tensor:
        """The layer with each row's own adapter: base layer and product as PEFT has them."""
        held = {n: self.ia3_l[n].flatten() for n in dict.fromkeys(adapter_names) if n in self.ia3_l}
        result: Tensor
        if not held:
            result = self.base_layer(x)
            return result
        scales = list(held.values())
        base = torch.ones_like(scales[0])
        if self.is_feedforward:
            scale = vectors(adapter_names, held, base, x)
            result = self.base_layer((x * scale).to(x.dtype))
            return result
        result = self.base_layer(x)
        return (result * vectors(adapter_names, held, base, result)).to(result.dtype)

    def rows(self: Any) -> Any:
        """The adapters' names by row, where rows have some of their own."""
        names = self.__dict__.get(ROWS)
        return None if names is None or self._disable_adapters else names


class FusedLinear(FusedIA3, ia3.Linear):
    """`ia3.Linear` over a dense `nn.Linear`, in one fused op."""

    stock_class = ia3.Linear
    method = "IA3"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] -> [..., N], as `ia3.Linear.forward`."""
        names = self.rows()
        if names is not None:
            return self.by_row(x, names)
        scale = self._fused_scale()
        if args or kwargs or isinstance(scale, str) or call_reason(x) is not None:
            return super().forward(x, *args, **kwargs)
        base: Any = self._modules["base_layer"]
        weight = base._parameters["weight"]
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        # What F.linear would compute in, and so give back.
        dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
        castable = autocast and x.dtype in KERNEL_DTYPES
        if (x.dtype != dtype and not castable) or no_kernel(
            "ia3_linear", device, dtype, weight.dtype
        ):
            return super().forward(x)
        bias = base._parameters.get("bias")
        feedforward = self.is_feedforward
        return ops.ia3_linear(x.to(dtype), weight, scale, bias=bias, feedforward=feedforward)

    def _fused_scale(self) -> Tensor | str:
        base: Any = self._modules["base_layer"]
        reason = linear_reason(base, "base_layer")
        if reason is not None:
            return reason
        if base._parameters["weight"].requires_grad:
            return "the base weight is trained"
        return self.active_scale()

    def fused_reason(self) -> str | None:
        """Why the layer, in its present state, runs PEFT's forward; None where it is fused."""
        scale = self._fused_scale()
        return scale if isinstance(scale, str) else self.fused_carrier()[1]

    def fused_carrier(self) -> tuple[str, str | None]:
        """(backend, reason against it) for an input of the weight's dtype and device."""
        weight = self.weight
        return carrier("ia3_linear", weight.device.type, weight.dtype, weight.dtype)


class FusedIA3Model(ia3.IA3Model):
    """`IA3Model` that gives each row of a batch the adapter that `adapter_names` says.

    In forward and generate, in training too; "__base__" is a row without adapter. PEFT 0.21 takes
    the argument and ignores it.
    """

    stock_class = ia3.IA3Model
    method = None  # no row in the report: its layers have theirs

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        check_rows(names, self.peft_config, args, kwargs)
        layers = [m for m in self.modules() if isinstance(m, ia3.IA3Layer)]
        _check_layers(layers)
        with rows_named(self, layers, tuple(names)), heads_by_row(self, names):
            yield


def _check_layers(layers: list[Any]) -> None:
    if any(layer.merged for layer in layers):
        raise ValueError("adapter_names: an adapter is merged; call unmerge_adapter() first")
    unfused = [type(layer).__name__ for layer in layers if not isinstance(layer, FusedIA3)]
    if unfused:
        raise ValueError(
            f"adapter_names: ia3.{unfused[0]} has no fused path, and PEFT's ignores the argument"
        )


SWAPS: dict[type[nn.Module], type[Any]] = {
    ia3.Linear: FusedLinear,
    ia3.IA3Model: FusedIA3Model,
}
