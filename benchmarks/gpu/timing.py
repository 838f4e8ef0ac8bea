"""Times on a GPU: events around each call, all contenders in turn, medians over rounds.

A default device is not set meanwhile: torch would look at every call for it, which takes time.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fusetune.bench.timing import orders

Run = Callable[[], Any]
DEVICE = "cuda"
_FLUSH = 256 << 20  # bytes: more than any card's L2 cache
_COPY = 1 << 30  # bytes
_MATMUL = 8192  # rows and columns


def compare(runs: dict[str, Run], seconds: float, rounds: tuple[int, int] = (5, 100)) -> Any:
    """{name: {"ms", "queued_ms", "peak_mib"}} and, beside the first contender, "ratio".

    ms: of one call on the card, from a cold L2 cache; the host has a start of the 0.1 to 1 ms that
    emptying the cache takes, so that up to there its launches cost nothing;
    queued_ms: of one call among others of its kind, in which all of the host's time shows;
    ratio: the median over rounds of its time over the first contender's;
    peak_mib: memory that the call allocates at most, its results included.
    """
    result: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        run()  # compiles
        result[name] = {"peak_mib": peak(run)}
    flush = torch.empty(_FLUSH, dtype=torch.uint8, device=DEVICE)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for order in orders(list(runs), seconds, rounds):
        for name in order:
            times[name].append(once(runs[name], flush))
    first = times[next(iter(runs))]
    for name, run in runs.items():
        result[name]["ms"] = statistics.median(times[name])
        result[name]["queued_ms"] = queued(run, result[name]["ms"])
        pairs = zip(times[name], first, strict=True)
        result[name]["ratio"] = statistics.median(own / ours for own, ours in pairs)
    return result


def once(run: Run, flush: torch.Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def queued(run: Run, ms: float) -> float:
    """Of one call, in the median of three rows of them."""
    calls = max(3, min(50, int(20 / max(ms, 1e-3))))
    rows = []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        rows.append(1e3 * (time.perf_counter() - begin) / calls)
    return statistics.median(rows)


def peak(run: Run) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def card(simulated: bool) -> dict[str, Any]:
    """The card's own limits, measured: GB/s of a copy, TFLOP/s of matmuls, µs a launch."""
    if simulated:
        return {}
    facts: dict[str, Any] = {"copy_gbs": copy_speed()}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
            continue
        facts[f"matmul_{name}_tflops"] = matmul_speed(dtype)
    tiny = torch.zeros(1, device=DEVICE)
    facts["launch_us"] = 1e3 * queued(lambda: tiny.add_(1), 0.005)
    return facts


def seconds_of(run: Run) -> float:
    flush = torch.empty(_FLUSH, dtype=torch.uint8, device=DEVICE)
    run()
    return statistics.median(once(run, flush) for _ in range(9)) / 1e3


def copy_speed() -> float:
    """GB/s, read and written."""
    source = torch.zeros(_COPY, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2e-9 * source.nbytes / seconds_of(lambda: target.copy_(source))


def matmul_speed(dtype: torch.dtype) -> float:
    """TFLOP/s on random numbers."""
    a, b = (torch.randn(_MATMUL, _MATMUL, device=DEVICE).to(dtype) for _ in range(2))
    return 2e-12 * _MATMUL**3 / seconds_of(lambda: a @ b)
