"""Drops the triplets of AdaLoRA that were pruned, for good."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fusetune.methods.adalora.tuner import WALK, tuner_of
from fusetune.nn.adalora_layers import Triplets, special, triplets


def compact(model: nn.Module, adapter_name: str | None = None) -> dict[str, int]:
    """Drops every triplet whose E is zero, in every layer of an AdaLoRA adapter, in place.

    To be called after training: a pruned triplet cannot come back from here, and an optimizer
    still has the old parameters. The model's outputs stay the same up to the order of sums, and
    so does what `save_pretrained` writes: PEFT loads it by the config's rank_pattern, which tells
    which triplets of init_r there are left. adapter_name: by default the adapter in training, or
    else the active one.

    Returns the rank of each layer by its name. Raises TypeError or ValueError, before anything is
    changed: no AdaLoRA adapter, or none of that name; merged layers; an adapter of which nothing
    would remain, which was not trained; sharded parameters; a rank_pattern of other ranks.
    """
    tuner = tuner_of(model)
    name = _adapter(tuner, adapter_name)
    config = tuner.peft_config[name]
    layers = triplets(tuner.model, name)
    _check(layers, name)
    kept = torch.cat([each.lora_E for each in layers]).flatten().ne(0).tolist()
    if not any(kept):
        raise ValueError(f"every E of the adapter {name!r} is zero: train it first")
    flags, pattern, first = [], {}, 0
    for each in layers:
        rank = each.lora_E.shape[0]
        flags.append(kept[first : first + rank])
        pattern[f"{each.name}.lora_E.{name}"] = _composed(each, flags[-1], config, name)
        first += rank
    for each, left in zip(layers, flags, strict=True):
        _drop(each, left, name)
    config.rank_pattern = pattern
    tuner.__dict__.pop(WALK, None)  # it has the old parameters
    if tuner.__dict__.get("trainable_adapter_name") == name:
        tuner.rankallocator.reset_ipt()
    return {each.name: sum(left) for each, left in zip(layers, flags, strict=True)}


def _adapter(tuner: Any, name: str | None) -> str:
    if name is None:
        trained: str | None = tuner.__dict__.get("trainable_adapter_name")
        return trained if trained is not None else tuner.active_adapters[0]
    if name not in tuner.peft_config:
        known = ", ".join(map(repr, tuner.peft_config))
        raise ValueError(f"adapter_name must be one of {known}, got {name!r}")
    return name


def _check(layers: list[Triplets], adapter: str) -> None:
    if not layers:
        raise ValueError(f"no layer has the AdaLoRA adapter {adapter!r}")
    for each in layers:
        if adapter in each.layer.merged_adapters:
            raise ValueError(f"{each.name} has {adapter!r} merged: call unmerge_adapter() first")
        for key in ("lora_A", "lora_E", "lora_B"):
            reason = special(getattr(each, key))
            if reason is not None:
                raise ValueError(f"{key} of {each.name} is {reason}: it cannot be cut")


def _composed(each: Triplets, left: list[bool], config: Any, adapter: str) -> list[bool]:
    """Which of the layer's init_r triplets are left, once those not in `left` are dropped."""
    if len(left) == config.init_r:
        return left
    name = f"{each.name}.lora_E"
    before = config.rank_pattern or {}
    present = before.get(f"{name}.{adapter}", before.get(name))
    if present is None or len(present) != config.init_r or sum(present) != len(left):
        raise ValueError(
            f"{each.name} has {len(left)} triplets, which is neither init_r ({config.init_r}) nor "
            "what the config's rank_pattern says"
        )
    rest = iter(left)
    return [was and next(rest) for was in present]


def _drop(each: Triplets, left: list[bool], adapter: str) -> None:
    """New parameters in the layer; ranknum, by which the scaling is divided, stays."""
    if all(left):
        return
    rows = torch.tensor(left).nonzero().flatten().to(each.lora_E.device)
    for key, dim in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
        old: Any = getattr(each, key)
        new = nn.Parameter(old.detach().index_select(dim, rows), requires_grad=old.requires_grad)
        each.layer._modules[key][adapter] = new
    each.layer.r[adapter] = len(rows)
