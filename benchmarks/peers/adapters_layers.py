"""Times the modules of the library `adapters`, one repetition for each line on stdin.

It runs in an environment of its own (`pip install torch==2.13.0 adapters==1.3.0
transformers==4.57.6 numpy`), as a child of a benchmark that alternates between it and us:

    child:  {"cases": [...], "adapters": "1.3.0", "torch": "2.13.0"}     once, when ready
    parent: sequential_768
    child:  {"case": "sequential_768", "seconds": 0.0123}

    printf 'fusion_3\\n' | python benchmarks/peers/adapters_layers.py     # by hand

A case is built and run once, untimed, when it is first named. fp32, one thread.
"""

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from adapters import DynamicAdapterFusionConfig, ParBnConfig, SeqBnConfig
from adapters.methods.modeling import Adapter, BertFusion, ParallelAdapter

Step = Callable[[], None]


def bottleneck(cls: type, config: object, hidden: int, bottleneck: int, tokens: int) -> Step:
    """Forward and backward of one adapter: gradients of input, residual and all parameters."""
    module = cls("a", hidden, bottleneck, config)
    torch.nn.init.normal_(module.adapter_up.weight, std=0.02)  # par_bn starts from zeros
    x, residual = (torch.randn(1, tokens, hidden, requires_grad=True) for _ in range(2))
    gradient = torch.randn(1, tokens, hidden)
    leaves = [x, residual, *module.parameters()]

    def step() -> None:
        # In a model x and the residual are no leaves: their gradients are handed on, not copied.
        torch.autograd.grad(module(x, residual)[0], leaves, gradient)

    return step


def fusion(adapters: int, hidden: int = 768, tokens: int = 2048) -> Step:
    """Forward of one fusion in eval mode, with the stack of the adapters' outputs it needs."""
    module = BertFusion(DynamicAdapterFusionConfig(), hidden, 0.0).eval()
    query, residual = (torch.randn(1, tokens, hidden) for _ in range(2))
    outputs = [torch.randn(1, tokens, hidden) for _ in range(adapters)]

    def step() -> None:
        with torch.no_grad():
            stacked = torch.stack(outputs).permute(1, 2, 0, 3)
            module(query, stacked, stacked, residual)

    return step


CASES: dict[str, Callable[[], Step]] = {
    "sequential_768": lambda: bottleneck(Adapter, SeqBnConfig(), 768, 48, 4096),
    "sequential_4096": lambda: bottleneck(Adapter, SeqBnConfig(), 4096, 64, 2048),
    "parallel_768": lambda: bottleneck(ParallelAdapter, ParBnConfig(), 768, 48, 4096),
    "parallel_4096": lambda: bottleneck(ParallelAdapter, ParBnConfig(), 4096, 64, 2048),
    "fusion_3": lambda: fusion(3),
    "fusion_8": lambda: fusion(8),
    "fusion_16": lambda: fusion(16),
}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    say({"cases": list(CASES), "adapters": version("adapters"), "torch": torch.__version__})
    steps: dict[str, Step] = {}
    for line in sys.stdin:
        case = line.strip()
        if case not in CASES:
            say({"case": case, "error": f"no such case; known: {', '.join(CASES)}"})
            continue
        if case not in steps:
            steps[case] = CASES[case]()
            steps[case]()
        start = time.perf_counter()
        steps[case]()
        say({"case": case, "seconds": time.perf_counter() - start})


def say(answer: dict[str, object]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
