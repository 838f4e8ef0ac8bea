"""What a few GPUs can do at most, by their data sheets. Rates are dense and per second."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Of a multiprocessor, for each clock; CUDA C++ programming guide: warp instructions of its four
# schedulers, passes through the 32 banks of shared memory, sectors from L1 (128 bytes), warp
# shuffles (32 lanes) and results of the special function units.
ISSUE = 4
WAVEFRONTS = 1
L1_SECTORS = 4
SHUFFLES = 1
SPECIAL = 16


class Card(NamedTuple):
    """memory: bytes/s. tensor: flop/s of 16-bit products added in fp32. fp32: flop/s."""

    name: str
    arch: int
    dtype: torch.dtype  # that one trains in
    memory: float
    tensor: float
    fp32: float
    multiprocessors: int
    clock: float
    source: str

    def per_clock(self, rate: float) -> float:
        """Per second, what each multiprocessor does `rate` of in a clock."""
        return rate * self.multiprocessors * self.clock


CARDS = (
    Card(
        "T4",
        75,
        torch.float16,
        memory=320e9,
        tensor=65e12,
        fp32=8.1e12,
        multiprocessors=40,
        clock=1.59e9,
        source="NVIDIA T4 data sheet; Turing architecture whitepaper",
    ),
    Card(
        "A100",
        80,
        torch.bfloat16,
        memory=2039e9,
        tensor=312e12,
        fp32=19.5e12,
        multiprocessors=108,
        clock=1.41e9,
        source="NVIDIA A100 80GB SXM data sheet; Ampere architecture whitepaper",
    ),
    Card(
        "RTX 4090",
        89,
        torch.bfloat16,
        memory=1008e9,
        tensor=165.2e12,
        fp32=82.6e12,
        multiprocessors=128,
        clock=2.52e9,
        source="NVIDIA Ada GPU architecture whitepaper",
    ),
    Card(
        "H100",
        90,
        torch.bfloat16,
        memory=3350e9,
        tensor=989.4e12,
        fp32=66.9e12,
        multiprocessors=132,
        clock=1.98e9,
        source="NVIDIA H100 SXM data sheet; Hopper architecture whitepaper",
    ),
    Card(
        "B200",
        100,
        torch.bfloat16,
        memory=8000e9,
        tensor=2250e12,
        fp32=75e12,
        multiprocessors=148,
        clock=1.965e9,
        source="NVIDIA HGX B200 data sheet, an eighth of it",
    ),
)
