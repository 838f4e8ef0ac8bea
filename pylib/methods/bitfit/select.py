"""Which biases of a model a BitFit adapter trains."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from fusetune.methods.bitfit.config import BitFitConfig
from fusetune.methods.bitfit.layer import BitFitLayer

# Last names of the layers that make queries, and of those in the middle of MLPs.
_QUERIES = ("query", "query_proj", "q_proj", "q_lin", "q", "Wq", "linear_q")
_MIDDLES = ("intermediate.dense", "fc1", "fc_in", "c_fc", "lin1", "dense_h_to_4h", "ffn_up", "wi")
_JOINED = ("c_attn", "qkv", "query_key_value", "Wqkv", "qkv_proj", "in_proj")


def selected(model: nn.Module, config: BitFitConfig) -> list[str]:
    """Paths of the modules whose biases a config means.

    Raises ValueError, naming `subset`, where there are none, or none of a kind that it names.
    """
    saved = tuple(config.modules_to_save or ())
    known = {name: m for name, m in _biased(model) if not _ends_with(name, saved)}
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if not known:
        raise ValueError(f"BitFit trains biases, and a {kind} has none: use another method")
    if isinstance(config.subset, list):
        return _by_names(known, config.subset)
    inside = _backbone(model)
    names = [name for name in known if name.startswith(inside)]
    if config.subset == "all":
        head = _output_of(model)
        names = [name for name in names if known[name] is not head]
        if not names:
            raise ValueError(
                f'subset="all": no layer of the {kind} but its head has a bias; '
                "give the names of modules"
            )
        return names
    return _queries_and_middles(names, kind)


def _by_names(known: dict[str, nn.Module], patterns: list[str]) -> list[str]:
    found: list[str] = []
    for pattern in patterns:
        names = [n for n in known if _ends_with(n, (pattern,)) or re.fullmatch(pattern, n)]
        if not names:
            raise ValueError(f"subset: {pattern!r} is the name of no module that has a bias")
        found += [name for name in names if name not in found]
    return found


def _queries_and_middles(names: list[str], kind: str) -> list[str]:
    queries = [name for name in names if _ends_with(name, _QUERIES)]
    middles = [name for name in names if _ends_with(name, _MIDDLES)]
    if queries and middles:
        return [name for name in names if name in {*queries, *middles}]
    joined = next((name for name in names if _ends_with(name, _JOINED)), None)
    missing = "biases of queries" if not queries else "biases in the middle of MLPs"
    why = "" if joined is None or queries else f": {joined} has one for queries, keys and values"
    raise ValueError(
        f'subset="bq_bm2": the {kind} has no {missing} of their own{why}; give the names of modules'
    )


def _ends_with(name: str, patterns: tuple[str, ...]) -> bool:
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _biased(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with a bias that is added by calling them; those in adapters under their own path."""
    skipped: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(outer) for outer in skipped):
            continue
        if isinstance(module, BitFitLayer):
            skipped.append(f"{name}.")
            yield name, module.base_layer
            continue
        # Attention of torch reads its output layer's parameters instead of calling it.
        if isinstance(module, nn.MultiheadAttention | AuxiliaryTrainingWrapper):
            skipped.append(f"{name}.")
            continue
        if name and _has_bias(module):
            yield name, module


def _has_bias(module: Any) -> bool:
    bias = module._parameters.get("bias")
    return isinstance(bias, torch.Tensor) and bias.dim() == 1 and not module._modules


def _backbone(model: Any) -> str:
    """What the paths of a transformers model's encoder or decoder begin with; "" for all."""
    prefix = getattr(model, "base_model_prefix", "")
    inside = getattr(model, prefix, None) if prefix else None
    return f"{prefix}." if isinstance(inside, nn.Module) and inside is not model else ""


def _output_of(model: Any) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return head.base_layer if isinstance(head, BitFitLayer) else head
