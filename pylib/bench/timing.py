"""How a case is checked, timed and compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from fusetune import _native

Result = torch.Tensor | tuple[torch.Tensor, ...]
Run = Callable[[], Result]


@dataclass(frozen=True)
class Case:
    """One measurement: what is computed, by us and by each peer.

    `exact` gives the result in float64; it and ours run from the same random seed. Ours may differ
    from it by `tolerance`, relative in the Frobenius norm, in any of its parts; otherwise nothing
    is timed. `flops` of one call; 0 where they are not the point.
    """

    op: str
    name: str
    shape: str
    ours: Run
    peers: dict[str, Run]
    exact: Run
    tolerance: float
    flops: float = 0.0


@dataclass
class Row:
    """A measured case. `ratio` of a peer: the median over rounds of its time over ours."""

    op: str
    name: str
    shape: str
    ms: float
    error: float
    peak_share: float | None
    ratio: dict[str, float] = field(default_factory=dict)
    peer_ms: dict[str, float] = field(default_factory=dict)
    peer_error: dict[str, float] = field(default_factory=dict)


def measure(case: Case, seconds: float = 2.0, rounds: tuple[int, int] = (7, 200)) -> Row:
    """Times ours and every peer in turn, round after round, for about `seconds`.

    All of a round run within a moment of each other, so a machine that slows down slows all.
    Raises RuntimeError where ours is not exact enough.
    """
    exact, got = (seeded(run) for run in (case.exact, case.ours))
    error = relative_error(got, exact)
    if not error <= case.tolerance:
        raise RuntimeError(
            f"{case.op} {case.name} {case.shape}: error {error:.2e} is above {case.tolerance:.0e}; "
            "nothing was timed"
        )
    runs = {"ours": case.ours, **case.peers}
    peer_error = {name: relative_error(run(), exact) for name, run in case.peers.items()}
    del exact, got
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks: list[float] = []
    for done, order in enumerate(orders(list(runs), seconds, rounds)):
        for name in order:
            begin = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - begin)
        if case.flops and done < 20:
            peaks += fma_peak()
    ours = times["ours"]
    return Row(
        op=case.op,
        name=case.name,
        shape=case.shape,
        ms=1e3 * statistics.median(ours),
        error=error,
        peak_share=case.flops / statistics.median(ours) / statistics.median(peaks)
        if peaks
        else None,
        ratio={
            name: statistics.median(p / o for p, o in zip(times[name], ours, strict=True))
            for name in case.peers
        },
        peer_ms={name: 1e3 * statistics.median(times[name]) for name in case.peers},
        peer_error=peer_error,
    )


def orders(names: list[str], seconds: float, rounds: tuple[int, int]) -> Iterator[list[str]]:
    """The order of each round, turned from one to the next, until about `seconds` are over.

    rounds: how many there are at least and at most.
    """
    stop = time.perf_counter() + seconds
    for done in range(rounds[1]):
        if done >= rounds[0] and time.perf_counter() > stop:
            return
        first = done % len(names)
        yield names[first:] + names[:first]


def fma_peak() -> list[float]:
    """The fp32 FMA peak of all threads in flop/s, measured just now; empty where it cannot be.

    The kernel measures one core, in Gflop/s.
    """
    if _native.C is None or not _native.C.has("fma_peak"):
        return []
    return [1e9 * _native.C.fma_peak(0.005) * _native.C.num_threads()]


def seeded(run: Run) -> Result:
    torch.manual_seed(0)
    return run()


def relative_error(got: Result, exact: Result) -> float:
    """Of the worst part; NaN where a part is missing or holds NaN."""
    got, exact = ((r,) if isinstance(r, torch.Tensor) else r for r in (got, exact))
    parts = [((g.double() - e).norm() / e.norm()).item() for g, e in zip(got, exact, strict=True)]
    return max(parts) if all(p == p for p in parts) else float("nan")
