"""Which way `_gpu_linear` takes: what was measured on this GPU, else a default.

What is best depends on the GPU, M, N, K, r and the dtype. With FUSETUNE_TUNE=1 every way is timed
the first time a case comes up, M rounded up to a power of two, and the choice kept in
`cache_path()`; what was measured once is used from then on, with or without the variable. Cases
that were not measured take `default`.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from fusetune.ops import _triton

Tensor = torch.Tensor
Ways = dict[str, Callable[[], Tensor]]

_VERSION = 1
_REPEAT = 10
_FEW = 64  # rows, for which Triton's tiles are small anyway


class Problem(NamedTuple):
    """One matmul: of M rows with a weight [N, K] and the adapter's tail."""

    what: str  # "y", "dx", or another name where other ways compete
    m: int
    n: int
    k: int
    rank: int  # 0: no tail
    dtype: torch.dtype
    device: torch.device
    masked: bool = False  # the tail has a dropout mask
    several: bool = False  # adapters
    repeatable: bool = True  # not for ways that add to what is there: they are never measured

    def key(self) -> str:
        """The name under which what was measured is kept."""
        rows = 1 << (self.m - 1).bit_length()
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"M {rows} N {self.n} K {self.k} r {self.rank}"
        dropout = " dropout" if self.masked else ""
        several = " of several" if self.several else ""
        return f"{_device_name(self.device)}: {self.what} {shape} {dtype}{dropout}{several}"


def default(problem: Problem, ways: Ways) -> str:
    """The way taken where nothing was measured: what is predicted to move the fewest bytes.

    cuda does not write a decoded W out; triton writes y once, while addmm reads and writes it again
    for the tail. Without a tail these two move the same, and the vendor's matmul is the faster.
    In fp32 Triton's has no tensor cores. Several adapters' parts leave it small tiles, which do no
    harm where there are few rows; with many the tail's bytes are few beside the matmul. Whatever
    the GPU, it is one of `ways`.
    """
    if "cuda" in ways:
        return "cuda"
    small = problem.several and problem.m > _FEW
    if "triton" in ways and problem.rank and problem.dtype != torch.float32 and not small:
        return "triton"
    return "addmm"


_forced: str | None = None


@contextmanager
def use_way(name: str) -> Iterator[None]:
    """Takes one way wherever it is to be had, for the length of a with block."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def choose(problem: Problem, ways: Ways) -> Callable[[], Tensor]:
    """One of `ways`, of which there is at least one."""
    if _forced in ways:
        return ways[_forced]
    if len(ways) == 1:
        return next(iter(ways.values()))
    key, measured = problem.key(), _measured()
    name = measured.get(key)
    if name in ways:
        return ways[name]
    device = problem.device
    if problem.repeatable and tuning() and not _capturing(device):
        name = min(ways, key=lambda way: _seconds(ways[way], device))
        measured[key] = name
        _save(measured)
    else:
        name = default(problem, ways)
    return ways[name]


def tuning() -> bool:
    """Whether cases that come up for the first time are measured."""
    return os.environ.get("FUSETUNE_TUNE", "") not in ("", "0")


# --- what was measured ----------------------------------------------------------------------------


def cache_path() -> Path:
    """Where measured choices are kept, for all processes of the user."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fusetune" / "linear.json"


@cache
def _measured() -> dict[str, str]:
    """What was measured before, by key; empty where the file is missing or cannot be read."""
    try:
        content = json.loads(cache_path().read_text())
        if content["version"] == _VERSION:
            return {str(key): str(name) for key, name in content["choices"].items()}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"fusetune ignores {cache_path()}: {error}", stacklevel=2)
    return {}


def forget() -> None:
    """Reads the file anew at the next call."""
    _measured.cache_clear()


def _save(measured: dict[str, str]) -> None:
    path = cache_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"version": _VERSION, "choices": measured}, indent=1))
        draft.replace(path)  # at once: another process never reads half of it
    except OSError as error:
        warnings.warn(f"fusetune cannot keep what it measured: {error}", stacklevel=2)


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Of one call, on the GPU; once warm."""
    call()
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(_REPEAT):
        call()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / _REPEAT / 1e3


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return f"simulated sm_{_triton.capability(device)}" if "cpu" in _triton.DEVICES else "cpu"
    return torch.cuda.get_device_name(device)
