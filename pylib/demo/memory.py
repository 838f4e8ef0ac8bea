"""Peak memory of a stretch of code: the GPU's allocator, or this process's resident set (Linux)."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass
from pathlib import Path

import torch

from fusetune import ops

MIB = 2**20


@dataclass(frozen=True)
class Peak:
    """In MiB. `total` counts everything resident, `start` what was resident before."""

    start: float
    total: float

    @property
    def extra(self) -> float:
        return self.total - self.start


class PeakMeter:
    """with PeakMeter(device) as meter: ...; then meter.peak, None where it cannot be measured.

    CPU: freed heap and what the kernels keep for their next results are handed back to the system
    first (malloc_trim, ops.empty_cache), so that what an earlier stretch left behind is not
    counted; then the kernel's high-water mark is reset through
    /proc/self/clear_refs and read from VmHWM. GPU: torch's allocator statistics.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.peak: Peak | None = None

    def __enter__(self) -> PeakMeter:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start: float | None = torch.cuda.memory_allocated(self.device) / MIB
            return self
        ops.empty_cache()
        trim_heap()
        self._start = status_mib("VmRSS") if reset_high_water() else None
        return self

    def __exit__(self, *exc: object) -> None:
        if self._start is None:
            return
        if self.device.type == "cuda":
            total: float | None = torch.cuda.max_memory_allocated(self.device) / MIB
        else:
            total = status_mib("VmHWM")
        if total is not None:
            self.peak = Peak(self._start, total)


def trim_heap() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        return


def reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def status_mib(key: str) -> float | None:
    """A field of /proc/self/status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    return None
