"""AdaLoRA's update_and_allocate, PEFT's against ours, for the layers of SmolLM2-135M.

    python -m benchmarks.adalora_allocator
    python -m benchmarks.adalora_allocator --json out.json

30 layers of 7 linears, r = 12, random gradients. Both take turns on two copies of the adapter, and
begin each turn with the same number of steps behind them; ratios are medians over pairs. Three
kinds of step: one that only updates the importances, one that prunes, and one after the ranks are
settled, which masks. The regulariser, forward and backward, is timed too.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

import fusetune
from benchmarks import figures
from fusetune.bench.in_turn import calls_in_turn
from fusetune.methods.adalora import update_and_allocate

HIDDEN, INNER, KV_HEADS, HEADS = 576, 1536, 3, 9
TOTAL, SETTLED = 1000, 900


def make(layers: int) -> Any:
    """SmolLM2-135M with a small vocabulary, which has no adapter."""
    from peft import AdaLoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    adapter = AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=12,
        target_r=8,
        total_step=TOTAL,
        tinit=0,
        tfinal=TOTAL - SETTLED,
        deltaT=10,
        target_modules="all-linear",
    )
    model = get_peft_model(LlamaForCausalLM(config), adapter)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.02)
            parameter.grad = 1e-3 * torch.randn_like(parameter)
    return model


def regulariser(model: Any) -> Callable[[], Any]:
    """The term of the loss and its gradients, by the tuner's own forward over an empty model."""
    tuner = model.base_model
    outputs = type("Outputs", (), {})

    def run() -> Any:
        result = outputs()
        result.loss = torch.zeros(())
        inner, tuner.model.forward = tuner.model.forward, lambda: result
        try:
            loss = tuner().loss
        finally:
            tuner.model.forward = inner
        loss.backward()
        return loss

    return run


def pairs(stock: Callable[[], Any], ours: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Medians of alternating pairs; the first pair is not counted."""
    turns = calls_in_turn({"peft": stock, "ours": ours}, rounds)
    return {
        "peft_ms": 1e3 * turns.median("peft"),
        "ours_ms": 1e3 * turns.median("ours"),
        "ratio": turns.ratio("peft", "ours"),
    }


def measure(layers: int, rounds: int) -> dict[str, dict[str, float]]:
    stock = make(layers)
    ours = copy.deepcopy(stock)
    for mine, theirs in zip(ours.parameters(), stock.parameters(), strict=True):
        mine.grad = None if theirs.grad is None else theirs.grad.clone()
    fusetune.fuse(ours)
    found = {}
    for name, step in {"update": 15, "update and prune": 20, "mask": SETTLED + 1}.items():
        if step > SETTLED:  # in between, once: it forgets the importances
            stock.base_model.update_and_allocate(SETTLED)
            update_and_allocate(ours, SETTLED)
        found[name] = pairs(
            functools.partial(stock.base_model.update_and_allocate, step),
            functools.partial(update_and_allocate, ours, step),
            rounds,
        )
        patterns = [model.peft_config["default"].rank_pattern for model in (stock, ours)]
        if patterns[0] != patterns[1]:
            raise RuntimeError(f"{name}: the two have kept different triplets")
    for model in (stock, ours):  # the regulariser is added to gradients, which would grow
        model.zero_grad(set_to_none=True)
    found["regulariser, forward and backward"] = pairs(
        regulariser(stock), regulariser(ours), rounds
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=15)
    options = figures.parsed(parser)
    found = measure(options.layers, options.rounds)
    for name, row in found.items():
        print(
            f"{name:<36} PEFT {row['peft_ms']:7.2f} ms, ours {row['ours_ms']:6.2f} ms, "
            f"ratio {row['ratio']:.1f}"
        )
    figures.write(options, found)


if __name__ == "__main__":
    main()
