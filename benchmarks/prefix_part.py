"""What a prefix adds to the time of the attention that it joins, on SmolLM2-135M's heads.

    python -m benchmarks.prefix_part --json benchmarks/results/prefix-part.json

8 rows of 512 tokens, a prefix of 32, fp32. Attention with and without the prefix run in turn, and
so does torch's without one; the part is the median over rounds of the difference over either.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import figures, method_tables
from fusetune import ops
from fusetune.bench.in_turn import calls_in_turn
from fusetune.env import cpu_label

BATCH, HEADS, KV_HEADS, TOKENS, DIM, PREFIX = 8, 9, 3, 512, 64, 32


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefix_part")
    parser.add_argument("--rounds", type=int, default=25)
    options = figures.parsed(parser)
    torch.manual_seed(0)
    rows = {
        f"{way}, {'causal' if causal else 'all tokens'}": measured(way, causal, options.rounds)
        for way in ("forward", "forward + backward")
        for causal in (True, False)
    }
    print(method_tables.prefix_part({"cpu": cpu_label(), "threads": options.threads, "rows": rows}))
    figures.write(options, rows)


def measured(way: str, causal: bool, rounds: int) -> dict[str, float]:
    query = torch.randn(BATCH, HEADS, TOKENS, DIM, requires_grad=True)
    key, value = (torch.randn(BATCH, KV_HEADS, TOKENS, DIM, requires_grad=True) for _ in range(2))
    prefix = [torch.randn(PREFIX, KV_HEADS, DIM, requires_grad=True) for _ in range(2)]
    tokens = [query, key, value]
    upper = torch.randn_like(query)

    def call(attend: Callable[..., torch.Tensor], leaves: list[torch.Tensor], **more: Any) -> Any:
        def run() -> None:
            out = attend(*leaves, is_causal=causal, **more)
            if way != "forward":
                torch.autograd.grad(out, leaves, upper)

        return run

    runs = {
        "torch": call(scaled_dot_product_attention, tokens, enable_gqa=True),
        "ours": call(ops.attention, tokens),
        "with prefix": call(ops.prefix_attention, [*tokens, *prefix]),
    }
    seconds = calls_in_turn(runs, rounds).seconds
    rounds_of = list(zip(*(seconds[name] for name in runs), strict=True))
    return {
        **{name: statistics.median(times) for name, times in seconds.items()},
        "of_ours": statistics.median((full - base) / base for _, base, full in rounds_of),
        "of_torch": statistics.median((full - base) / torch_s for torch_s, base, full in rounds_of),
    }


if __name__ == "__main__":
    main()
