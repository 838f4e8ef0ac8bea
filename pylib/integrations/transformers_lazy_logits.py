"""Causal language models whose logits are computed, in training, only where somebody reads them.

The loss is the only reader in most training, and `ops.linear_cross_entropy` needs no more than the
last layer's inputs. So that layer returns `LazyLogits`, and our loss takes them apart. A model that
was asked for its logits computes them at once from there on, until `fuse` is called again: computed
twice they would cost more than they save.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fusetune.integrations import transformers as loss
from fusetune.integrations._classes import set_class
from fusetune.integrations._guards import (
    KERNEL_DTYPES,
    call_reason,
    carrier,
    module_reason,
    no_kernel,
)
from fusetune.integrations._lazy_logits import lazy_logits
from fusetune.integrations.linear import FusedLinear

METHOD = "lazy logits"
_MARK = "_fusetune_lazy_logits"  # of a model that is to have them
_READ = "_fusetune_read"  # of its head: not empty where its logits were read
_CLASSES = (nn.Linear, FusedLinear)


class LazyHead(FusedLinear):
    """The last layer of a model with our loss."""

    method = METHOD

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., V], as `nn.Linear.forward`; a `LazyLogits` in training."""
        if torch.compiler.is_compiling():
            return nn.functional.linear(x, self.weight, self.bias)
        if (
            not (self.training and torch.is_grad_enabled() and x.requires_grad)
            or self.fused_reason() is not None
            or call_reason(x) is not None
        ):
            return super().forward(x)
        weight: torch.Tensor = self.weight
        bias: torch.Tensor | None = self.bias
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            if dtype not in KERNEL_DTYPES:
                return super().forward(x)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = bias if bias is None else bias.to(dtype)
        if x.dtype != weight.dtype or x.shape[-1:].numel() != weight.shape[1]:
            return super().forward(x)
        return lazy_logits(x, weight, bias, self.__dict__.setdefault(_READ, []))

    def fused_reason(self) -> str | None:
        """Why the logits are computed at once; None where they are not."""
        if self.__dict__.get(_READ):
            return "something in training reads the logits"
        # Also of what FSDP or accelerate have made of it: they take the weight away after the call.
        reason = module_reason(self, "the last layer", LazyHead) or head_reason(self)
        if reason is not None:
            return reason
        weight = self.weight
        if no_kernel("linear_cross_entropy", weight.device.type, weight.dtype, weight.dtype):
            return "no kernel for this model"
        return None


def head_reason(head: nn.Module) -> str | None:
    """Why a layer cannot be one with lazy outputs, wherever it is."""
    for name in ("weight", "bias"):
        parameter = getattr(head, name)
        if parameter is None:
            continue
        if type(parameter) is not nn.Parameter:
            return f"the {name} is not a plain parameter but {type(parameter).__name__}"
        if parameter.requires_grad:
            return f"the {name} is trained"
        if parameter.dtype not in KERNEL_DTYPES:
            return f"the {name} is {parameter.dtype}"
    return None


def install(module: nn.Module) -> bool:
    """Lets a language model have lazy logits; False where it is none.

    With another loss than ours it has a row that says so, and nothing else.
    """
    if not isinstance(module, PreTrainedModel):
        return False
    head: Any = module.get_output_embeddings()
    if head is None and not loss.installed(module):
        return False
    module.__dict__[_MARK] = True
    if not loss.installed(module):
        return True
    if type(head) in _CLASSES and _plain_reason(head) is None:
        set_class(head, LazyHead)
    if type(head) is LazyHead:
        head.__dict__.pop(_READ, None)
    return True


def _plain_reason(head: Any) -> str | None:
    return module_reason(head, "the last layer", type(head))


def installed(module: nn.Module) -> bool:
    """Whether a model was to have lazy logits."""
    return _MARK in module.__dict__


def fused_carrier(module: Any) -> tuple[str, str | None]:
    """(backend, the reason why the logits are computed at once)."""
    if not loss.installed(module):
        return "-", "its loss is not one that is fused, and reads the logits"
    head = module.get_output_embeddings()
    if head is None:
        return "-", "the model has no last layer"
    if type(head) is not LazyHead:
        taken = _plain_reason(head) if type(head) in _CLASSES else None
        kind = getattr(head, "stock_class", type(head))
        return "-", taken or f"the last layer is a {kind.__module__}.{kind.__qualname__}"
    weight = head.weight
    backend, reason = carrier("linear_cross_entropy", weight.device.type, *2 * (weight.dtype,))
    return backend, reason or head.fused_reason()


def restore(module: Any) -> None:
    """Takes lazy logits from a model."""
    if not installed(module):
        return
    del module.__dict__[_MARK]
    head = module.get_output_embeddings()
    if type(head) is LazyHead:
        set_class(head, nn.Linear)
