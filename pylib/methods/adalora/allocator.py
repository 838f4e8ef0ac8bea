"""AdaLoRA's allocation of ranks, in a few operations over all layers at once.

The same result as PEFT's `RankAllocator`, whose state it keeps where PEFT does: importance of the
weights, budget by a cubic schedule, one threshold for all triplets, pruned triplets that come back
when their importance grows. The host waits for the device once in a step that prunes, to write
`rank_pattern`, and never in another.

Unlike PEFT it works with init_r equal to target_r, and for a model that was resumed with some
triplets already dropped, which count as pruned.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.adalora import AdaLoraModel
from torch import nn

from fusetune import ops
from fusetune.methods.adalora.tuner import trained_adapter, tuner_of
from fusetune.nn.adalora_layers import Triplets, special, triplets

Tensor = torch.Tensor


def update_and_allocate(model: nn.Module, step: int, *, gradients: bool = True) -> None:
    """One step of AdaLoRA's schedule, after `optimizer.step()` and before `zero_grad()`.

    model: with PEFT's AdaLoRA, fused or not. step: counts from 1 to the config's total_step; in
    step total_step - tfinal the ranks are settled, so it may not be left out. gradients: False
    where this step's gradients are of no use, as when a loss scaler skipped the optimizer's step:
    the importances then stay as they are.

    Raises TypeError or ValueError for a model without such an adapter or without gradients, and
    for a config whose target_r exceeds init_r.
    """
    allocate(tuner_of(model), step, gradients=gradients)


@torch.no_grad()
def allocate(tuner: Any, step: int, *, gradients: bool = True) -> None:
    """`update_and_allocate` for PEFT's `AdaLoraModel` itself."""
    adapter = trained_adapter(tuner)
    layers = triplets(tuner.model, adapter)
    if not layers:
        raise ValueError(f"no layer has the AdaLoRA adapter {adapter!r}")
    if _foreign(layers):  # DeepSpeed's and FSDP's parameters are PEFT's matter
        return AdaLoraModel.update_and_allocate(tuner, step)
    config, allocator = tuner.peft_config[adapter], tuner.rankallocator
    if config.target_r > config.init_r:
        raise ValueError(
            f"target_r ({config.target_r}) must be at most init_r ({config.init_r}): ranks are "
            "only taken away"
        )
    settled = config.total_step - config.tfinal
    if step > settled:
        _mask(layers, config.rank_pattern, adapter, settled)
        return None
    scores = _scores(layers, allocator, adapter, gradients and step < settled)
    budget, due = allocator.budget_schedule(step)
    if due or step == settled:
        config.rank_pattern = _prune(layers, scores, budget, adapter)
    if step == settled:
        allocator.reset_ipt()
    return None


def _foreign(layers: list[Triplets]) -> bool:
    from transformers.integrations import deepspeed_config

    if deepspeed_config() is not None:
        return True
    parameters = (p for each in layers for p in (each.lora_A, each.lora_E, each.lora_B))
    return any(special(parameter) is not None for parameter in parameters)


def _scores(layers: list[Triplets], allocator: Any, adapter: str, update: bool) -> Tensor:
    """Brings the importances up to date, and joins those of all triplets."""
    total: Tensor | int = 0
    _forget_other_ranks(layers, allocator, adapter)
    for key, dim in (("lora_A", 1), ("lora_B", 0), ("lora_E", 1)):
        names = [f"{each.name}.{key}.{adapter}" for each in layers]
        weights = [getattr(each, key) for each in layers]
        sensitivity = _averages(allocator.exp_avg_ipt, names, weights)
        uncertainty = _averages(allocator.exp_avg_unc, names, weights)
        # PEFT tells by this one whether a name is new. What it holds is never read.
        allocator.ipt.update(zip(names, sensitivity, strict=True))
        grads = _gradients(names, weights) if update else None
        betas = allocator.beta1, allocator.beta2
        total = total + ops.importance(weights, grads, sensitivity, uncertainty, *betas, dim)
    assert isinstance(total, Tensor)
    return total


def _averages(kept: dict[str, Tensor], names: list[str], weights: list[Tensor]) -> list[Tensor]:
    for name, weight in zip(names, weights, strict=True):
        if name not in kept:
            kept[name] = torch.zeros_like(weight)
    return [kept[name] for name in names]


def _forget_other_ranks(layers: list[Triplets], allocator: Any, adapter: str) -> None:
    """Drops the averages of layers whose triplets were loaded anew, in another number."""
    for each in layers:
        known = allocator.exp_avg_ipt.get(f"{each.name}.lora_E.{adapter}")
        if known is None or known.shape == each.lora_E.shape:
            continue
        for kept in (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc):
            for key in ("lora_A", "lora_B", "lora_E"):
                kept.pop(f"{each.name}.{key}.{adapter}", None)


def _gradients(names: list[str], weights: list[Tensor]) -> list[Tensor]:
    grads = []
    for name, weight in zip(names, weights, strict=True):
        if weight.grad is None:
            raise ValueError(
                f"{name} has no gradient: call update_and_allocate after backward() and before "
                "zero_grad()"
            )
        grads.append(weight.grad)
    return grads


def _prune(
    layers: list[Triplets], scores: Tensor, budget: int, adapter: str
) -> dict[str, list[bool]]:
    """Zeroes all but the `budget` most important triplets; which were kept, by PEFT's names."""
    excess = scores.numel() - budget
    if excess > 0:
        threshold = torch.kthvalue(scores, excess).values
        kept = ~(scores <= threshold)  # not `>`: a NaN stays, as in PEFT
        _zero(layers, kept)
    else:
        kept = torch.ones(scores.numel(), dtype=torch.bool)
    flags: list[bool] = kept.tolist()
    pattern, first = {}, 0
    for each in layers:
        rank = each.lora_E.shape[0]
        pattern[f"{each.name}.lora_E.{adapter}"] = flags[first : first + rank]
        first += rank
    return pattern


def _mask(
    layers: list[Triplets], pattern: dict[str, list[bool]] | None, adapter: str, settled: int
) -> None:
    """Zeroes what the settled pattern leaves out: the optimizer has moved it again."""
    if pattern is None:
        raise ValueError(
            f"the config's rank_pattern is None after step {settled} = total_step - tfinal: "
            "update_and_allocate was not called in that step"
        )
    flags: list[bool] = []
    for each in layers:
        name = f"{each.name}.lora_E"  # PEFT leaves out the adapter's name when it saves
        wanted = pattern.get(f"{name}.{adapter}", pattern.get(name))
        if wanted is None:
            raise ValueError(f"the config's rank_pattern has no entry for {name}")
        rank = each.lora_E.shape[0]
        if len(wanted) == rank:
            flags += wanted
        elif sum(wanted) == rank:  # dropped by now
            flags += [True] * rank
        else:
            raise ValueError(
                f"the config's rank_pattern keeps {sum(wanted)} of {len(wanted)} triplets of "
                f"{name}, which has {rank}"
            )
    _zero(layers, torch.tensor(flags).to(layers[0].lora_E.device))


def _zero(layers: list[Triplets], kept: Tensor) -> None:
    values = [each.lora_E for each in layers]
    joined = torch.cat(values).masked_fill_(~kept[:, None], 0)
    torch._foreach_copy_(values, list(joined.split([each.shape[0] for each in values])))
