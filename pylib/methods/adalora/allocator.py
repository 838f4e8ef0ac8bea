"""AdaLoRA's allocation of ranks, in a few operations over all layers at once.

The same result as PEFT's `RankAllocator`, whose state it keeps where PEFT does: importance of the
weights, budget by a cubic schedule, one threshold for all triplets, pruned triplets that come back
when their importance grows. The host waits for the device once in a step that prunes, to write
`rank_pattern`, and never in another.

Unlike PEFT it works with init_r equal to target_r, and for a model that was resumed with some
triplets already dropped, which count as pruned.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.adalora import AdaLoraModel
from torch import nn

from fusetune import ops
from fusetune.methods.adalora.tuner import WALK, trained_adapter, tuner_of
from fusetune.nn.adalora_layers import KEYS, Walk, special

Tensor = torch.Tensor


class _Mask(NamedTuple):
    """What a pattern came to for layers of these shapes."""

    pattern: dict[str, list[bool]]
    shapes: list[torch.Size]
    kept: Tensor


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
    walk = _walk(tuner, adapter)
    if not walk.layers:
        raise ValueError(f"no layer has the AdaLoRA adapter {adapter!r}")
    if _foreign(walk):  # DeepSpeed's and FSDP's parameters are PEFT's matter
        return AdaLoraModel.update_and_allocate(tuner, step)
    config, allocator = tuner.peft_config[adapter], tuner.rankallocator
    if config.target_r > config.init_r:
        raise ValueError(
            f"target_r ({config.target_r}) must be at most init_r ({config.init_r}): ranks are "
            "only taken away"
        )
    settled = config.total_step - config.tfinal
    if step > settled:
        _mask(walk, config.rank_pattern, settled)
        return None
    scores = _scores(walk, allocator, gradients and step < settled)
    budget, due = allocator.budget_schedule(step)
    if due or step == settled:
        config.rank_pattern = _prune(walk, scores, budget)
    if step == settled:
        allocator.reset_ipt()
    return None


def _walk(tuner: Any, adapter: str) -> Walk:
    known: Walk | None = tuner.__dict__.get(WALK)
    if known is not None and known.holds(tuner.model, adapter):
        return known
    walk = Walk(tuner.model, adapter)
    tuner.__dict__[WALK] = walk
    return walk


def _foreign(walk: Walk) -> bool:
    from transformers.integrations import deepspeed_config

    if deepspeed_config() is not None:
        return True
    return any(any(map(special, walk.parameters[key])) for key in KEYS)


def _scores(walk: Walk, allocator: Any, update: bool) -> Tensor:
    """Brings the importances up to date, and joins those of all triplets."""
    total: Tensor | int = 0
    _forget_other_ranks(walk, allocator)
    for key, dim in (("lora_A", 1), ("lora_B", 0), ("lora_E", 1)):
        names, weights = walk.names[key], walk.parameters[key]
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
    if not all(map(kept.__contains__, names)):
        for name, weight in zip(names, weights, strict=True):
            if name not in kept:
                kept[name] = torch.zeros_like(weight)
    return [kept[name] for name in names]


def _forget_other_ranks(walk: Walk, allocator: Any) -> None:
    """Drops the averages of layers whose triplets were loaded anew, in another number."""
    for i, (name, weight) in enumerate(
        zip(walk.names["lora_E"], walk.parameters["lora_E"], strict=True)
    ):
        known = allocator.exp_avg_ipt.get(name)
        if known is None or known.shape == weight.shape:
            continue
        for kept in (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc):
            for key in KEYS:
                kept.pop(walk.names[key][i], None)


def _gradients(names: list[str], weights: list[Tensor]) -> list[Tensor]:
    grads = [weight.grad for weight in weights]
    present = [grad for grad in grads if grad is not None]
    if len(present) == len(grads):
        return present
    first = next(name for name, grad in zip(names, grads, strict=True) if grad is None)
    raise ValueError(
        f"{first} has no gradient: call update_and_allocate after backward() and before zero_grad()"
    )


def _prune(walk: Walk, scores: Tensor, budget: int) -> dict[str, list[bool]]:
    """Zeroes all but the `budget` most important triplets; which were kept, by PEFT's names."""
    excess = scores.numel() - budget
    if excess > 0:
        threshold = torch.kthvalue(scores, excess).values
        kept = ~(scores <= threshold)  # not `>`: a NaN stays, as in PEFT
        _zero(walk, kept)
    else:
        kept = torch.ones(scores.numel(), dtype=torch.bool)
    flags: list[bool] = kept.tolist()
    pattern, first = {}, 0
    for name, weight in zip(walk.names["lora_E"], walk.parameters["lora_E"], strict=True):
        rank = weight.shape[0]
        pattern[name] = flags[first : first + rank]
        first += rank
    return pattern


def _mask(walk: Walk, pattern: dict[str, list[bool]] | None, settled: int) -> None:
    """Zeroes what the settled pattern leaves out: the optimizer has moved it again."""
    if pattern is None:
        raise ValueError(
            f"the config's rank_pattern is None after step {settled} = total_step - tfinal: "
            "update_and_allocate was not called in that step"
        )
    weights = walk.parameters["lora_E"]
    shapes, device = [weight.shape for weight in weights], weights[0].device
    mask: _Mask | None = walk.mask
    if mask is None or mask[:2] != (pattern, shapes) or mask.kept.device != device:
        copied = {name: list(wanted) for name, wanted in pattern.items()}
        mask = walk.mask = _Mask(copied, shapes, _settled(walk, pattern).to(device))
    _zero(walk, mask.kept)


def _settled(walk: Walk, pattern: dict[str, list[bool]]) -> Tensor:
    """Which triplets a pattern keeps, of all layers one after the other."""
    flags: list[bool] = []
    for each, full_name in zip(walk.layers, walk.names["lora_E"], strict=True):
        name = f"{each.name}.lora_E"  # PEFT leaves out the adapter's name when it saves
        wanted = pattern.get(full_name, pattern.get(name))
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
    return torch.tensor(flags)


def _zero(walk: Walk, kept: Tensor) -> None:
    values = walk.parameters["lora_E"]
    joined = torch.cat(values).masked_fill_(~kept[:, None], 0)
    torch._foreach_copy_(values, list(joined.split([each.shape[0] for each in values])))
