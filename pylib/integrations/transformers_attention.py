"""Fused sdpa attention of transformers' models, on CPUs: with dropout of its weights, and without.

The function is nn/fused_sdpa.py's. Attention by another function, elsewhere than on a CPU, with a
bias of the positions (T5), or, on CPUs with AMX, in bfloat16 without dropout is none of ours, and
the report does not mention it. Calls with a single query or, without dropout, with more than 2,048
keys run the stock function, which is as fast there; so does compiled code, which torch is to see
whole.
"""

from __future__ import annotations

import torch
from torch import nn

from fusetune.integrations._guards import carrier
from fusetune.nn import fused_sdpa
from fusetune.ops._base_attention_cpu import is_faster_in

METHOD = "attention"
fused_sdpa.register()  # a model that was fused elsewhere has its name


def install(module: nn.Module, *, dropout: bool = True) -> bool:
    """Gives an attention module the fused function; False where it is none of ours.

    dropout: also where it drops weights, with masks of its own.
    """
    if not fused_sdpa.looks_up(module) or any(p.device.type != "cpu" for p in module.parameters()):
        return False
    drops = fused_sdpa.holder(module) is not None
    if dropout if drops else is_faster_in(_dtype(module)):
        fused_sdpa.switch(module)
    return installed(module)


def _dtype(module: nn.Module) -> torch.dtype:
    """Of a module's activations, as its base weights tell it; where all are 4-bit, its config."""
    named = module.named_parameters()
    own = (p.dtype for name, p in named if p.is_floating_point() and "lora_" not in name)
    stated = getattr(getattr(module, "config", None), "dtype", None)
    return next(own, stated if isinstance(stated, torch.dtype) else torch.float32)


def installed(module: nn.Module) -> bool:
    """Whether an attention module has the fused function."""
    return fused_sdpa.looks_up(module) and fused_sdpa.name_of(module) == fused_sdpa.NAME


def fused_carrier(module: nn.Module) -> tuple[str, str | None]:
    """(backend, reason against it) of an attention module."""
    dtype = _dtype(module)
    if not is_faster_in(dtype) and fused_sdpa.holder(module) is None:
        return "-", f"torch's kernel for {dtype}, which has this CPU's units for it"
    return carrier("attention", "cpu", dtype)


def restore(module: nn.Module) -> None:
    """Gives an attention module the stock function back."""
    if installed(module):
        fused_sdpa.switch_back(module)
