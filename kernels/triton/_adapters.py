"""Several LoRA adapters in one launch: who serves which rows, as the kernels read it.

The rows of x are `entries` of `block` rows each. Adapter i serves n_i of them, in their order: its
rows 0 to n_i block - 1, whose s [n_i block, r_i] lie together, one adapter's after the other's.
Where all adapters serve all rows there is one entry.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fusetune._triton._tile import signed


class Plan(NamedTuple):
    """Of the adapters. Tables are int32; where s begins is counted in blocks."""

    ranks: tuple[int, ...]
    entries: int
    most: int  # entries of the adapter that serves most
    size: int  # of all s, in blocks: the sum of n_i r_i
    records: torch.Tensor  # [adapters, 8], see `record`
    served: torch.Tensor  # the entries of each adapter, one adapter after the other
    places: torch.Tensor  # [adapters, entries]: where s of an entry begins, -1: not served


Dropout = tuple[int, float]  # threshold and factor


@lru_cache(maxsize=256)
def make_plan(
    adapter_of: tuple[int, ...] | None,
    ranks: tuple[int, ...],
    scaling: tuple[float, ...],
    dropouts: tuple[Dropout, ...],
    device: torch.device,
) -> Plan:
    """adapter_of: the adapter of each entry, -1 for none; None: one entry, which all serve.

    Kept, as the layers of a model and the steps of a generation ask for the same: only the first
    waits for the tables.
    """
    entries = 1 if adapter_of is None else len(adapter_of)
    served = [
        [e for e in range(entries) if adapter_of is None or adapter_of[e] == i]
        for i in range(len(ranks))
    ]
    records, places, before, start, first = [], [], 0, 0, 0
    for own, rank, scale, (threshold, factor) in zip(served, ranks, scaling, dropouts, strict=True):
        floats = struct.unpack("ii", struct.pack("ff", factor, scale))
        records.append([rank, before, len(own), first, start, signed(threshold), *floats])
        place = [-1] * entries
        for j, e in enumerate(own):
            place[e] = start + j * rank
        places.append(place)
        before, start, first = before + rank, start + len(own) * rank, first + len(own)

    def table(values: Sequence[object]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    most = max(len(own) for own in served)
    every = [e for own in served for e in own]
    return Plan(ranks, entries, most, start, table(records), table(every), table(places))


@triton.jit
def record(records, i):
    """Of adapter i: its rank and the sum of those before; how many entries it serves, and where
    they begin in `served`; where its s begins; dropout's threshold and factor; the scaling."""
    records += i * 8
    rank = tl.load(records)
    before = tl.load(records + 1).to(tl.int64)
    count = tl.load(records + 2)
    first = tl.load(records + 3)
    start = tl.load(records + 4).to(tl.int64)
    threshold = tl.load(records + 5)
    factor = tl.load(records + 6).to(tl.float32, bitcast=True)
    scaling = tl.load(records + 7).to(tl.float32, bitcast=True)
    return rank, before, count, first, start, threshold, factor, scaling


@triton.jit
def rows_of_x(served, first, j, valid, block):
    """Which rows of x are rows j of the adapter whose entries begin at served + first; int64."""
    j = j.to(tl.int32)
    entry = tl.load(served + first + j // block, mask=valid, other=0)
    return entry.to(tl.int64) * block + j % block
