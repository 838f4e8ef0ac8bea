"""Several LoRA adapters at once, fused beside PEFT alone.

    python -m benchmarks.multi_adapter

Times one adapted linear layer (2048 x 2048, r = 16, fp32) under eight adapters: a batch of eight
rows, each with an adapter of its own, and all eight active together; few tokens a row and 64;
dense and NF4 (bitsandbytes); the forward pass alone, and forward and backward to x and every
lora_A and lora_B. PEFT runs in evaluation, where alone it takes an adapter for each row; without
dropout its arithmetic is that of training.

Calls of all take turns; the figures are medians, the speed-up is the median of its pairs. "base" is
PEFT's base layer alone, one way or both: what no implementation of the adapters can save. What
PEFT and the fused layer take beyond it is what the adapters cost.

In the forward pass alone bitsandbytes repacks a 4-bit weight on CPUs with AVX512-BF16 and
multiplies in bfloat16, which shows in the difference of the results; fused layers multiply in fp32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fusetune
from benchmarks import figures
from fusetune.bench.in_turn import calls_in_turn

ADAPTERS, RANK = 8, 16
NAMES = [f"adapter{i}" for i in range(ADAPTERS)]


def adapted(size: int, four_bit: bool) -> Any:
    """A model of PEFT's layer under eight adapters, all trained, in evaluation; always the same."""
    import bitsandbytes
    from peft import LoraConfig
    from peft.tuners import lora
    from peft.tuners.lora.bnb import Linear4bit

    torch.manual_seed(0)
    base: Any = nn.Linear(size, size, bias=False)
    if four_bit:
        weight = bitsandbytes.nn.Params4bit(base.weight.data, quant_type="nf4")
        base = bitsandbytes.nn.Linear4bit(
            size, size, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        base.weight = weight
        base = base.to("cpu")
    base.requires_grad_(False)
    config = LoraConfig(r=RANK, init_lora_weights=False)
    kind: Any = Linear4bit if four_bit else lora.Linear
    layer = kind(base, NAMES[0], config=config, r=RANK, lora_alpha=RANK)
    for name in NAMES[1:]:
        layer.update_layer(name, RANK, lora_alpha=RANK, config=config)
    layer.set_adapter(NAMES)
    return nn.Sequential(layer).eval()


def measured(
    size: int, tokens: int, four_bit: bool, by_row: bool, train: bool, pairs: int
) -> dict[str, float]:
    """Seconds of stock, fused and base, the speed-up, and the largest relative difference."""
    stock, fused = (adapted(size, four_bit) for _ in range(2))
    fusetune.fuse(fused)
    x = torch.randn(ADAPTERS, tokens, size, requires_grad=train)
    dy = torch.randn(ADAPTERS, tokens, size)
    options = {"adapter_names": NAMES} if by_row else {}

    def run(layer: Any, given: dict[str, Any]) -> list[torch.Tensor]:
        """The output and the gradients."""
        trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
        for tensor in trained:
            tensor.grad = None
        with torch.set_grad_enabled(train):
            y = layer(x, **given)
        if train:
            y.backward(dy)
        return [y.detach(), *(t.grad for t in trained if t.grad is not None)]

    runs: dict[str, Callable[[], list[torch.Tensor]]] = {
        "stock": lambda: run(stock[0], options),
        "base": lambda: run(stock[0].base_layer, {}),
        "fused": lambda: run(fused[0], options),
    }
    pairs_of = zip(runs["fused"](), runs["stock"](), strict=True)
    difference = max(((a - b).norm() / b.norm()).item() for a, b in pairs_of)
    turns = calls_in_turn(runs, pairs)
    found = {f"{what}_s": turns.median(what) for what in runs}
    return {**found, "speedup": turns.ratio("stock", "fused"), "difference": difference}


def line(row: dict[str, float]) -> str:
    stock, fused, base = (1e3 * row[f"{what}_s"] for what in ("stock", "fused", "base"))
    return (
        f"stock {stock:8.2f} ms, fused {fused:8.2f} ms, base alone {base:8.2f} ms: "
        f"{row['speedup']:5.2f}x, results differ by {row['difference']:.0e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 64])
    parser.add_argument("--pairs", type=int, default=25)
    options = figures.parsed(parser)
    found: dict[str, dict[str, float]] = {}
    for by_row in (True, False):
        for four_bit in (False, True):
            for tokens in options.tokens:
                for train in (False, True):
                    name = (
                        f"{'an adapter a row' if by_row else 'all active'}, "
                        f"{'NF4' if four_bit else 'dense'}, {ADAPTERS} x {tokens} tokens, "
                        f"{'forward and backward' if train else 'forward'}"
                    )
                    row = measured(options.size, tokens, four_bit, by_row, train, options.pairs)
                    found[name] = row
                    print(f"{name:62} {line(row)}", flush=True)
    figures.write(options, found)


if __name__ == "__main__":
    main()
