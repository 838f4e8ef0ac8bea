"""Whether transformers' experts can be carried out from their weights and PEFT's adapters."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any, NamedTuple

import torch
from torch import nn

from fusetune.integrations._guards import KERNEL_DTYPES, module_reason

Tensor = torch.Tensor
moe: Any = None  # of transformers, where it has one
with contextlib.suppress(ImportError):
    moe = importlib.import_module("transformers.integrations.moe")
# What transformers' decorator for experts says of a class, and its functions go by.
_ATTRIBUTES = (
    "config",
    "has_bias",
    "has_gate",
    "has_post_expert_norm",
    "is_transposed",
    "num_experts",
    "_apply_gate",
    "_is_expert_parallel",
)


class Factors(NamedTuple):
    """One active adapter of a stack of weights."""

    lora_A: Tensor  # [E, r, K]
    lora_B: Tensor  # [E, N, r]
    scaling: float


Adapters = dict[str, Factors | None]  # by the weight's name; None: no active adapter


def active_factors(layer: Any) -> Factors | str | None:
    """The one active adapter of a `lora.ParamWrapper`, or why PEFT has to carry it out."""
    if layer._disable_adapters:
        return "adapters are disabled"
    if layer.merged_adapters:
        return "the adapter is merged"
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) > 1:
        return f"{len(names)} active adapters"
    if not names:
        return None
    scaling = layer.scaling[names[0]]
    if isinstance(scaling, Tensor):
        return "the scaling is a tensor"
    weights = [
        layers[names[0]]._parameters.get("weight") for layers in (layer.lora_A, layer.lora_B)
    ]
    for role, weight in zip(("lora_A", "lora_B"), weights, strict=True):
        if type(weight) is not nn.Parameter or hasattr(weight, "ds_id"):
            return f"the weight of {role} is not a plain parameter but {type(weight).__name__}"
    lora_A, lora_B = weights
    if lora_A.dtype != lora_B.dtype or lora_A.dtype not in KERNEL_DTYPES:
        return f"lora_A is {lora_A.dtype}, lora_B {lora_B.dtype}"
    experts = layer.num_experts
    by_expert = lora_A.view(experts, -1, lora_A.shape[1])
    packed = lora_B.view(lora_B.shape[0], -1, experts)  # an expert in every last place
    return Factors(by_expert, packed.permute(2, 0, 1), scaling)


def experts_reason(experts: Any, adapters: Adapters) -> str | None:
    """Why the experts have to be called; None where their attributes say what they compute."""
    kind = type(experts)
    name = f"the base layer is a {kind.__name__}"
    if moe is None or not hasattr(moe, "_grouped_linear"):
        return "this transformers has no grouped experts"
    if not kind.__module__.startswith("transformers.models.") or not _decorated(kind):
        return f"{name}, not one of transformers' experts"
    reason = module_reason(experts, "the experts", kind)
    if reason is not None:
        return reason
    unknown = [name for name in _ATTRIBUTES if not hasattr(experts, name)]
    if unknown:
        return f"this transformers' experts have no {', '.join(unknown)}"
    implementation = getattr(experts.config, "_experts_implementation", None)
    if not _known(implementation):
        return f"the experts' implementation {implementation!r} is not known"
    if experts._is_expert_parallel:
        return "the experts are spread over processes"
    names = {"gate_up_proj" if experts.has_gate else "up_proj", "down_proj"}
    if not adapters.keys() <= names:
        return f"adapters of {', '.join(sorted(adapters.keys() - names))} are not fused"
    for name in names:
        reason = _stack_reason(name, experts._parameters.get(name), experts)
        if reason is not None:
            return reason
    for name, factors in adapters.items():
        weight = as_stored(experts, name)
        fits = factors is None or (
            (weight.shape[0], factors.lora_B.shape[1], factors.lora_A.shape[2]) == weight.shape
        )
        if not fits:
            return f"the adapter of {name} has not its weight's shape"
    return None


def _decorated(kind: Any) -> bool:
    """Whether the class's forward is the dispatcher of transformers' decorator for experts."""
    forward = kind.__dict__.get("forward")
    code = getattr(forward, "__code__", None)
    if code is None or "experts_interface" not in code.co_freevars:
        return False
    interface = forward.__closure__[code.co_freevars.index("experts_interface")].cell_contents
    return interface is moe.ALL_EXPERTS_FUNCTIONS


def _known(implementation: Any) -> bool:
    """Whether transformers' own function is what the name stands for. "eager": the class's own."""
    registered = moe.ALL_EXPERTS_FUNCTIONS.get(implementation)
    if implementation == "eager":
        return registered is None
    own = getattr(moe, f"{implementation}_experts_forward", None)
    return implementation in ("batched_mm", "grouped_mm") and registered is own


def _stack_reason(name: str, weight: Any, experts: Any) -> str | None:
    if type(weight) is not nn.Parameter:
        return f"{name} is not a plain parameter but {type(weight).__name__}"
    if hasattr(weight, "ds_id"):
        return f"{name} is partitioned by DeepSpeed"
    if weight.dim() != 3 or weight.shape[0] != experts.num_experts:
        return f"{name} is no stack of {experts.num_experts} matrices"
    if weight.dtype not in KERNEL_DTYPES:
        return f"{name} is {weight.dtype}"
    return f"{name} is trained" if weight.requires_grad else None


def grouped_reason(experts: Any) -> str | None:
    """Why torch's grouped product may refuse the stacks; None where it takes them."""
    if experts.config._experts_implementation == "grouped_mm":
        return None  # the stock code makes the same products
    sizes = {
        size for name in ("up_proj", "gate_up_proj", "down_proj") for size in _size(experts, name)
    }
    odd = any(size % 8 for size in sizes)
    return (
        "the experts' sizes are no multiples of 8, as torch's grouped product asks" if odd else None
    )


def _size(experts: Any, name: str) -> tuple[int, ...]:
    weight = experts._parameters.get(name)
    return () if weight is None else tuple(weight.shape[1:])


def as_stored(experts: Any, name: str) -> Tensor:
    """The stack [E, N, K]: a view where it is stored transposed."""
    weight: Tensor = experts._parameters[name]
    return weight.transpose(1, 2) if experts.is_transposed else weight
