"""Fused forward of PEFT's LoRA on token embeddings, by class swap."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from torch import nn

from fusetune import ops
from fusetune.integrations._guards import (
    KERNEL_DTYPES,
    call_reason,
    carrier,
    module_reason,
    no_kernel,
)
from fusetune.nn._token_embedding import scale_of


class Adapter(NamedTuple):
    """What a fused look-up needs of the one active adapter."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float | torch.Tensor


class FusedEmbedding(lora.Embedding):
    """`lora.Embedding` in one fused op. PEFT applies no dropout to it."""

    stock_class = lora.Embedding
    method = "LoRA"

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [...] of token ids -> [..., H], as `lora.Embedding.forward`."""
        if args or kwargs:  # adapter_names
            return super().forward(x, *args, **kwargs)
        adapter = self._fused_adapter()
        if isinstance(adapter, str) or call_reason(x) is not None or x.dtype not in _IDS:
            return super().forward(x)
        base: Any = self._modules["base_layer"]
        weight = base._parameters["weight"]
        if no_kernel("lora_embedding", weight.device.type, weight.dtype, weight.dtype):
            return super().forward(x)
        if type(base) is not nn.Embedding and torch.compiler.is_compiling():
            return super().forward(x)  # its scale is in a tensor, which a graph cannot read
        scale = scale_of(base)
        assert scale is not None  # base_reason
        return ops.lora_embedding(x, weight, *adapter, scale=scale, padding_idx=base.padding_idx)

    def _fused_adapter(self) -> Adapter | str:
        return base_reason(self._modules["base_layer"]) or active_adapter(self)

    def fused_reason(self) -> str | None:
        """Why the layer, in its present state, runs PEFT's forward; None where it is fused."""
        adapter = self._fused_adapter()
        return adapter if isinstance(adapter, str) else self.fused_carrier()[1]

    def fused_carrier(self) -> tuple[str, str | None]:
        """(backend, reason against it) for the table's dtype and device."""
        weight = self.weight
        return carrier("lora_embedding", weight.device.type, weight.dtype, weight.dtype)


_IDS = (torch.int64, torch.int32)


def base_reason(base: Any) -> str | None:
    """Why the table cannot be read in the module's place; None where it can."""
    if not isinstance(base, nn.Embedding) or scale_of(base) is None:
        return f"base_layer is a {type(base).__name__}, not a plain Embedding"
    reason = module_reason(base, "base_layer", type(base))
    if reason is not None:
        return reason
    weight = base._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return f"the table is not a plain parameter but {type(weight).__name__}"
    if hasattr(weight, "ds_id"):
        return "the table is partitioned by DeepSpeed"
    if weight.requires_grad:
        return "the base weight is trained"
    if base.max_norm is not None:
        return "the embeddings have max_norm, which changes the table as it is read"
    if base.scale_grad_by_freq or base.sparse:
        return "the embeddings have scale_grad_by_freq or sparse gradients"
    return None


def active_adapter(layer: Any) -> Adapter | str:
    """The one active adapter of a `lora.Embedding`, or why PEFT has to carry it out."""
    if layer._disable_adapters:
        return "adapters are disabled"
    if layer.merged_adapters:
        return "the adapter is merged"
    # A ParameterDict's own look-up of a parameter goes by attributes.
    in_layer = layer._modules["lora_embedding_A"]._parameters
    names = [name for name in layer.active_adapters if name in in_layer]
    if len(names) != 1:
        return f"{len(names)} active adapters" if names else "no active adapter"
    name = names[0]
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__} is not fused"
    if layer.input_fns.get(name) is not None or layer.output_fns.get(name) is not None:
        return "tensor parallelism is on"
    lora_A, lora_B = in_layer[name], layer._modules["lora_embedding_B"]._parameters[name]
    for role, parameter in (("lora_embedding_A", lora_A), ("lora_embedding_B", lora_B)):
        if type(parameter) is not nn.Parameter or hasattr(parameter, "ds_id"):
            return f"{role} is not a plain parameter but {type(parameter).__name__}"
    if lora_A.dtype != lora_B.dtype or lora_A.dtype not in KERNEL_DTYPES:
        return f"lora_embedding_A is {lora_A.dtype}, lora_embedding_B {lora_B.dtype}"
    return Adapter(lora_A, lora_B, layer.scaling[name])


SWAPS: dict[type[nn.Module], type[nn.Module]] = {lora.Embedding: FusedEmbedding}
