"""Fused dropout of transformers' own models, on CPUs, by class swap.

PyTorch draws a mask element by element on one thread, and keeps it. Here it is a function of a seed
(reference/dropout.py), as it is in LoRA's layers. Modules of torch's Dropout are swapped where they
lie in a module of transformers. Elsewhere than on a CPU they are none of ours, and the report does
not mention them.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from fusetune import ops
from fusetune.integrations._guards import KERNEL_DTYPES, call_reason, carrier, no_kernel
from fusetune.nn import fused_sdpa

_ours: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # the modules that were met


class FusedDropout(nn.Dropout):
    stock_class = nn.Dropout
    method = "dropout"

    @classmethod
    def accepts(cls, module: Any) -> bool:
        """Whether a dropout is one of a model of transformers."""
        return module in _ours

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As the stock class, with another mask."""
        if (
            not self.training
            or not self.p
            or self.inplace
            or call_reason(input) is not None
            or torch.compiler.is_compiling()
            or input.device.type != "cpu"
            or input.dtype not in KERNEL_DTYPES
            or no_kernel("dropout", "cpu", input.dtype)
        ):
            return super().forward(input)
        return ops.dropout(input, self.p)

    def fused_reason(self) -> str | None:
        """Why the module, in its present state, runs the stock class's code; None: it is fused."""
        return "it works in place" if self.inplace else self.fused_carrier()[1]

    def fused_carrier(self) -> tuple[str, str | None]:
        """(backend, reason against it) for fp32."""
        return carrier("dropout", "cpu", torch.float32)


SWAPS: dict[type[nn.Module], type[Any]] = {nn.Dropout: FusedDropout}


def discover(model: nn.Module) -> None:
    """Notes the dropouts of a model on a CPU that are transformers' own."""
    if not _on_cpu(model):
        return
    for name, module in model.named_modules():
        if type(module) is not nn.Dropout or module.p == 0:
            continue
        path, _, own = name.removesuffix(".base_layer").rpartition(".")
        parent = model.get_submodule(path)
        if _is_transformers(parent) and own != fused_sdpa.holder(parent):
            _ours.add(module)


def _is_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.models.")


def _on_cpu(model: nn.Module) -> bool:
    return all(parameter.device.type == "cpu" for parameter in model.parameters())
