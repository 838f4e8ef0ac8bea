"""Fused forward of PEFT's AdaLoRA, by class swap of its layers and of its tuner.

A layer is a LoRA layer whose lora_A is diag(E) A: `ops.lora_linear` computes it, and autograd takes
the gradients of A and E from that of the product. `ranknum`, the divisor of the scaling, is a
constant here. PEFT makes it a trained parameter by mistake where the base is of 16 bits: its
upcast of the adapter puts it into the ParameterDict anew, and the scaling drifts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.adalora import AdaLoraModel, SVDLinear
from torch import nn

from fusetune import ops
from fusetune.integrations._guards import (
    KERNEL_DTYPES,
    call_reason,
    carrier,
    linear_reason,
    module_reason,
    no_kernel,
)
from fusetune.integrations._lora_adapters import Adapter
from fusetune.integrations.peft import Call, dense_dtype, fused_linear
from fusetune.nn.adalora_layers import special, triplets

_PARAMETERS = ("lora_A", "lora_E", "lora_B", "ranknum")
_TRAINED = "_fusetune_trained_ranknum"  # in a layer: adapters whose ranknum PEFT would train
EPS = 1e-5  # beside ranknum, as in PEFT


class SvdAdapter(NamedTuple):
    """What a fused forward needs of the one active adapter."""

    lora_A: torch.Tensor
    lora_E: torch.Tensor
    lora_B: torch.Tensor
    ranknum: torch.Tensor
    scaling: float
    dropout_p: float  # 0 in evaluation

    def folded(self) -> Adapter:
        """As a LoRA: lora_A [r, K] is scaling / ranknum diag(E) A, in fp32."""
        scale = self.scaling / (self.ranknum.detach().float() + EPS)
        lora_A = self.lora_A.float() * (self.lora_E.float() * scale)
        return Adapter(lora_A, self.lora_B, None, 1.0, self.dropout_p, None)


def active_adapter(layer: Any) -> SvdAdapter | str:
    """The one active adapter of an `AdaLoraLayer`, or why PEFT has to carry it out."""
    if layer._disable_adapters:
        return "adapters are disabled"
    if layer.merged_adapters:
        return "the adapter is merged"
    modules = layer._modules
    held = [modules[key]._parameters for key in _PARAMETERS]
    names = [name for name in layer.active_adapters if name in held[0]]
    if len(names) != 1:
        return f"{len(names)} active adapters" if names else "no active adapter"
    name = names[0]
    parameters: list[Any] = [of[name] for of in held]
    for key, parameter in zip(_PARAMETERS, parameters, strict=True):
        reason = special(parameter)
        if reason is not None:
            return f"{key} is {reason}"
    dtypes = {parameter.dtype for parameter in parameters[:3]}
    if len(dtypes) != 1 or not dtypes <= KERNEL_DTYPES:
        return f"the adapter is of {', '.join(sorted(map(str, dtypes)))}"
    if not parameters[0].shape[0]:
        return "every rank was pruned"
    dropout = modules["lora_dropout"]._modules[name]
    dropout_kind = nn.Dropout if type(dropout) is nn.Dropout else nn.Identity
    reason = module_reason(dropout, "lora_dropout", dropout_kind)
    if reason is not None:
        return reason
    p = dropout.p if dropout_kind is nn.Dropout and dropout.training else 0.0
    lora_A, lora_E, lora_B, ranknum = parameters
    return SvdAdapter(lora_A, lora_E, lora_B, ranknum, layer.scaling[name], p)


def freeze_ranknum(layer: Any) -> None:
    """Nothing trains `ranknum` while the layer is fused, whoever computes it."""
    for name, parameter in layer._modules["ranknum"]._parameters.items():
        if parameter.requires_grad:
            layer.__dict__.setdefault(_TRAINED, set()).add(name)
            parameter.requires_grad_(False)
            parameter.grad = None


def release_ranknum(layer: Any) -> None:
    """Undoes `freeze_ranknum`."""
    for name in layer.__dict__.pop(_TRAINED, ()):
        if name in layer.ranknum:
            layer.ranknum[name].requires_grad_()


class FusedSVD:
    """What the fused layers share; the first base of each, which knows its base layer's weight."""

    stock_class: type[nn.Module]
    method: str

    def after_fuse(self) -> None:
        """After the class was swapped in, and when `fuse` comes again."""
        freeze_ranknum(self)

    def before_unfuse(self) -> None:
        """Before it is swapped out."""
        release_ranknum(self)

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., K] -> [..., N], as the stock class."""
        call = None if args or kwargs else self._call(x)
        if call is None:
            y: torch.Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return y
        return fused_linear(self, x, call)

    def _call(self: Any, x: torch.Tensor) -> Call | None:
        """What is fused of a call with x; None: PEFT's forward has to run."""
        adapter = self._fused_adapter()
        if isinstance(adapter, str) or call_reason(x) is not None:
            return None
        weight = self._weight()
        dtype = None if isinstance(weight, str) else self._dtype(x, weight, adapter.lora_A.dtype)
        if dtype is None:
            return None
        bias = self._modules["base_layer"]._parameters.get("bias")
        return Call(dtype, weight, bias, adapter.folded())

    def _fused_adapter(self: Any) -> SvdAdapter | str:
        return self._base_reason() or active_adapter(self)

    def fused_reason(self: Any) -> str | None:
        """Why the layer, in its present state, runs PEFT's forward; None where it is fused."""
        adapter = self._fused_adapter()
        if isinstance(adapter, str):
            return adapter
        weight = self._weight()
        reason: str | None = weight if isinstance(weight, str) else self.fused_carrier()[1]
        return reason


class FusedSVDLinear(FusedSVD, SVDLinear):
    """`adalora.SVDLinear` over a dense `nn.Linear`, in one fused op."""

    stock_class = SVDLinear
    method = "AdaLoRA"

    def _base_reason(self) -> str | None:
        base: Any = self._modules["base_layer"]
        reason = linear_reason(base, "base_layer")
        if reason is None and base._parameters["weight"].requires_grad:
            return "the base weight is trained"
        return reason

    def _weight(self) -> torch.Tensor:
        base: Any = self._modules["base_layer"]
        weight: torch.Tensor = base._parameters["weight"]
        return weight

    def _dtype(
        self, x: torch.Tensor, weight: torch.Tensor, adapter: torch.dtype
    ) -> torch.dtype | None:
        dtype = dense_dtype(self, x, weight, adapter)
        if dtype is None or no_kernel("lora_linear", x.device.type, dtype, weight.dtype):
            return None
        return dtype

    def fused_carrier(self) -> tuple[str, str | None]:
        """(backend, reason against it) for an input of the weight's dtype and device."""
        weight = self.weight
        return carrier("lora_linear", weight.device.type, weight.dtype, weight.dtype)


class FusedAdaLoraModel(AdaLoraModel):
    """`AdaLoraModel` with the orthogonality term and the allocation of ranks in few operations.

    A loss without a trained adapter, at which PEFT's forward raises AttributeError, has no term.
    """

    stock_class = AdaLoraModel
    method = "AdaLoRA regularisation"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock class: adds orth_reg_weight times `ops.orthogonality` to a loss."""
        found = self._regularised()
        if isinstance(found, str):
            return super().forward(*args, **kwargs)
        outputs = self.model.forward(*args, **kwargs)
        weight, rows, columns = found
        if rows and isinstance(getattr(outputs, "loss", None), torch.Tensor):
            outputs.loss += weight * ops.orthogonality(rows, columns)
        return outputs

    def update_and_allocate(self, global_step: int) -> None:
        """As the stock class; see `fusetune.methods.adalora.update_and_allocate`."""
        try:
            from fusetune.methods.adalora import allocator
        except ImportError:  # a PEFT that is too old for fusetune's methods
            return super().update_and_allocate(global_step)
        return allocator.allocate(self, global_step)

    def _regularised(self) -> tuple[float, list[torch.Tensor], list[torch.Tensor]] | str:
        """(the term's weight, its matrices A, its matrices B), or why PEFT has to add it."""
        name = self.__dict__.get("trainable_adapter_name")
        if name is None:
            return 0.0, [], []
        layers = triplets(self.model, name)
        rows, columns = [each.lora_A for each in layers], [each.lora_B for each in layers]
        config: Any = self.peft_config[name]
        weight = config.orth_reg_weight
        if weight < 0:
            return "orth_reg_weight is negative"
        for parameter in rows + columns:
            reason = special(parameter)
            if reason is not None:
                return f"a parameter is {reason}"
        if len({parameter.device for parameter in rows + columns}) > 1:
            return "the adapter lies on several devices"
        return weight, rows, columns

    def fused_reason(self) -> str | None:
        """Why the model, in its present state, runs PEFT's term; None where it is fused."""
        found = self._regularised()
        return found if isinstance(found, str) else None

    def fused_carrier(self) -> tuple[str, str | None]:
        """(backend, None): the term is batched matrix products of torch."""
        return "torch", None


SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    SVDLinear: FusedSVDLinear,
    AdaLoraModel: FusedAdaLoraModel,
}
