"""The layer that a BitFit adapter puts around a module with a bias."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.modules.module as torch_module
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from fusetune.nn.adapter_rows import ROWS, vectors
from fusetune.ops._trained_bias import trained_bias

Tensor = torch.Tensor
_PLAIN = frozenset((nn.Linear, Conv1D, nn.LayerNorm))
_QUANTIZED = ("Linear4bit", "Linear8bitLt")  # bitsandbytes', which need not be there


class BitFitLayer(nn.Module, BaseTunerLayer):
    """A module with one of several biases in place of its own.

    The module's own bias stays as it is: it is there while adapters are disabled. With one active
    adapter the bias is that adapter's; with several it is b + sum_i (b_i - b).
    """

    adapter_layer_names = ("bitfit_bias",)
    calls_base_layer = True  # and never reads its weight: `fuse` may fuse it by itself

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bitfit_bias = nn.ParameterDict()
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []
        # The base layer's own bias, while another one is merged.
        self.register_buffer("bitfit_own", None, persistent=False)

    def update_layer(self, adapter_name: str, inference_mode: bool) -> None:
        """Adds an adapter that starts from the module's own bias."""
        self.bitfit_bias[adapter_name] = nn.Parameter(self._own().detach().clone())
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the base layer's."""
        base: Any = self._modules["base_layer"]
        result: Tensor
        names = self.__dict__.get(ROWS)
        if names is not None and not self._disable_adapters:
            return self._by_row(base(*args, **kwargs), names)
        bias = self._active_bias()
        if bias is None:
            result = base(*args, **kwargs)
            return result
        dim = self._bias_dim()
        own = base._parameters["bias"]
        base._parameters["bias"] = (bias if dim is None else bias.detach()).to(own.dtype)
        try:
            result = base(*args, **kwargs)
        finally:
            base._parameters["bias"] = own
        return result if dim is None else trained_bias(result, bias, dim)

    def stock_reason(self) -> str | None:
        """Why autograd sums the bias's gradient, in the dtype of the output; None where we do."""
        if self._bias_dim() is None:
            return f"a {_kind(self.base_layer).__name__} with hooks, or of an unknown kind"
        return None

    def active_names(self) -> list[str]:
        """The active adapters that this layer has; none while they are disabled or merged."""
        if self._disable_adapters or self.merged_adapters:
            return []
        return [name for name in self.active_adapters if name in self.bitfit_bias]

    def _active_bias(self) -> Tensor | None:
        names = self.active_names()
        return self._sum_of(names) if names else None

    def _sum_of(self, names: list[str]) -> Tensor:
        if len(names) == 1:
            one: Tensor = self.bitfit_bias[names[0]]
            return one
        own = self._own().detach().to(torch.promote_types(self._own().dtype, torch.float32))
        total = own
        for name in names:
            total = total + (self.bitfit_bias[name] - own)
        return total

    def _own(self) -> Tensor:
        kept = self._buffers["bitfit_own"]
        return self._present() if kept is None else kept

    def _present(self) -> Tensor:
        base: Any = self._modules["base_layer"]
        bias: Tensor = base._parameters["bias"]
        return bias

    def _bias_dim(self) -> int | None:
        """Along which dimension of its result the module adds its bias; None: who knows."""
        base: Any = self._modules["base_layer"]
        if base._forward_hooks or "forward" in base.__dict__ or torch_module._global_forward_hooks:
            return None
        kind = _kind(base)
        if kind in _PLAIN or kind.__name__ in _QUANTIZED:
            return -1
        if isinstance(base, _ConvNd):
            return -1 - len(base.kernel_size)
        return None

    # --- adapters by row --------------------------------------------------------------------------

    def _by_row(self, y: Tensor, adapter_names: Any) -> Tensor:
        dim = self._bias_dim()
        if dim is None:
            raise ValueError(f"adapter_names: {self.stock_reason()}")
        names = [name for name in dict.fromkeys(adapter_names) if name in self.bitfit_bias]
        held = {name: self.bitfit_bias[name] for name in names}
        if not held:
            return y
        own = self._own().detach()
        added = {name: bias - own for name, bias in held.items()}
        zero = torch.zeros_like(next(iter(added.values())))
        last = y.movedim(dim, -1)
        return (last + vectors(adapter_names, added, zero, last)).to(y.dtype).movedim(-1, dim)

    # --- merging ----------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts the adapters' bias in place of the base layer's own. As PEFT's layers do."""
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names or () if name in self.bitfit_bias]
        if not names:
            return
        present = self._present()
        merged = self._sum_of([*self.merged_adapters, *names]).detach().to(present.dtype).clone()
        if safe_merge and not merged.isfinite().all():
            raise ValueError(f"NaNs detected in the merged bias. The adapters {names} seem broken")
        if self._buffers["bitfit_own"] is None:
            self._buffers["bitfit_own"] = present.data
        present.data = merged
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Gives the base layer its own bias back, the very one."""
        kept = self._buffers["bitfit_own"]
        if kept is not None:
            self._present().data = kept
            self._buffers["bitfit_own"] = None
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return f"bitfit.{super().__repr__()}"


def _kind(module: nn.Module) -> type[nn.Module]:
    """Its class, or the one that it had before it was fused."""
    kind: type[nn.Module] = getattr(module, "stock_class", type(module))
    return kind
