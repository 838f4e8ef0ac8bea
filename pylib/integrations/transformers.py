"""The loss over the vocabulary of transformers' models, in one fused op.

A model's `loss_function` is a property that a model instance may override. It is overridden only
where it is transformers' own causal or masked language-model loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss, ForMaskedLMLoss

from fusetune import ops
from fusetune.integrations._guards import carrier, case_of, no_kernel
from fusetune.integrations._lazy_logits import source_of

METHOD = "cross-entropy"
_ATTRIBUTE = "_loss_function"  # what transformers' setter writes


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """`transformers.loss.loss_utils.ForCausalLMLoss`: tokens < n predict n.

    logits [..., T, vocab_size] of any float dtype, labels [..., T]; the loss is fp32.
    """
    if _is_stock(logits):
        stock: Callable[..., torch.Tensor] = ForCausalLMLoss
        kwargs["shift_labels"] = shift_labels
        return stock(logits, labels, vocab_size, num_items_in_batch, ignore_index, **kwargs)
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return _reduced(logits, shift_labels, vocab_size, num_items_in_batch, ignore_index)


def masked_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> torch.Tensor:
    """`transformers.loss.loss_utils.ForMaskedLMLoss`: as above without the shift."""
    if _is_stock(logits):
        stock: Callable[..., torch.Tensor] = ForMaskedLMLoss
        return stock(logits, labels, vocab_size, num_items_in_batch, ignore_index, **kwargs)
    return _reduced(logits, labels, vocab_size, num_items_in_batch, ignore_index)


def _is_stock(logits: torch.Tensor) -> bool:
    """Whether no kernel can take these logits: float64, or a device that has none."""
    return no_kernel("cross_entropy", logits.device.type, logits.dtype)


def _reduced(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None,
    ignore_index: int,
) -> torch.Tensor:
    labels = labels.reshape(-1).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction}
    source = source_of(logits)
    if source is not None and len(source.weight) == vocab_size:
        x = source.x.reshape(-1, source.x.shape[-1])
        loss = ops.linear_cross_entropy(x, source.weight, labels, source.bias, **options)
    else:
        loss = ops.cross_entropy(logits.view(-1, vocab_size), labels, **options)
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


_FUSED: dict[Callable[..., torch.Tensor], Callable[..., torch.Tensor]] = {
    ForCausalLMLoss: causal_lm_loss,
    ForMaskedLMLoss: masked_lm_loss,
}


def install(module: nn.Module) -> bool:
    """Gives a model the fused loss; False where it has none, or another one than the stock loss."""
    if not isinstance(module, PreTrainedModel) or _ATTRIBUTE in module.__dict__:
        return False
    if "loss_function" not in inspect.unwrap(type(module).forward).__code__.co_names:
        return False  # no head, or a loss written into forward
    # As the property does, which would warn where it takes the default.
    stock = LOSS_MAPPING.get(getattr(module, "loss_type", None) or "", ForCausalLMLoss)
    if stock not in _FUSED:
        return False
    module.loss_function = _FUSED[stock]
    return True


def installed(module: nn.Module) -> bool:
    """Whether a model has the fused loss."""
    return module.__dict__.get(_ATTRIBUTE) in _FUSED.values()


def fused_carrier(module: nn.Module) -> tuple[str, str | None]:
    """(backend, reason against it) of the loss on the model's device, as its parameters tell it."""
    return carrier("cross_entropy", *case_of(module))


def restore(module: nn.Module) -> None:
    """Gives a model its own loss back."""
    if installed(module):
        del module.__dict__[_ATTRIBUTE]
