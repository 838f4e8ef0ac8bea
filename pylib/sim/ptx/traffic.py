"""How much memory traffic an access of a warp makes, exactly."""

from __future__ import annotations

import numpy as np

from fusetune.sim.ptx.types import Array

SECTOR = 32  # bytes
BANKS = 32  # of 4 bytes each
_NOWHERE = np.int64(-1)  # the address of a lane that takes no part


def sectors(address: Array, mask: Array | None) -> tuple[int, int]:
    """(requests, sectors) of a global access: warps that take part, and distinct sectors of each.

    address [threads]: aligned to the access, which is at most one sector.
    """
    sector = address.reshape(-1, 32) >> 5
    if mask is not None:
        sector = np.where(mask.reshape(-1, 32), sector, _NOWHERE)
        sector.sort(axis=1)
        steps = sector[:, 1:] != sector[:, :-1]
        requests = int(np.count_nonzero(sector[:, -1] >= 0))
        # Absent lanes come first: the step from them to the first sector is one of those counted.
        return requests, int(np.count_nonzero(steps)) + int(np.count_nonzero(sector[:, 0] >= 0))
    difference = sector[:, 1:] - sector[:, :-1]
    if difference.min() < 0:
        sector = np.sort(sector, axis=1)
        difference = sector[:, 1:] - sector[:, :-1]
    return len(sector), len(sector) + int(np.count_nonzero(difference))


def touched(address: Array, mask: Array | None) -> Array:
    """The numbers of those sectors: each once for every warp that touches it, warp by warp."""
    sector = address.reshape(-1, 32) >> 5
    if mask is not None:
        sector = np.where(mask.reshape(-1, 32), sector, _NOWHERE)
    sector = np.sort(sector, axis=1)
    new = sector >= 0
    new[:, 1:] &= sector[:, 1:] != sector[:, :-1]
    return sector[new]


def wavefronts(address: Array, size: int, mask: Array | None) -> tuple[int, int]:
    """(requests, wavefronts) of a shared-memory access of `size` bytes a lane.

    Up to 4 bytes the warp is served at once, 8 bytes by half-warps, 16 bytes by quarters: each such
    group takes as many passes as the most loaded bank has distinct words. address [threads].
    """
    word = max(4, size)
    group = BANKS * 4 // word  # lanes served together; also how many words a pass delivers
    unit = (address >> _LOG2[word]).reshape(-1, group)
    if mask is None:
        requests = len(address) // 32
        return requests, _passes(unit, group)
    active = mask.reshape(-1, group)
    requests = int(np.count_nonzero(mask.reshape(-1, 32).any(1)))
    some = active.any(1)
    unit, active = unit[some], active[some]
    first = unit[np.arange(len(unit)), active.argmax(1)]  # an absent lane repeats an active one
    return requests, _passes(np.where(active, unit, first[:, None]), group)


_LOG2 = {4: 2, 8: 3, 16: 4}


def _passes(unit: Array, banks: int) -> int:
    """Sum over rows of the greatest number of distinct units in one bank."""
    bank = unit & (banks - 1)
    if banks == unit.shape[1]:
        seen = np.bitwise_or.reduce(np.left_shift(1, bank, dtype=np.int64), axis=1)
        if (seen == (1 << banks) - 1).all():  # every lane has a bank of its own
            return len(unit)
    unit = np.sort(unit, axis=1)
    is_new = np.empty(unit.shape, np.bool_)
    is_new[:, 0] = True
    np.not_equal(unit[:, 1:], unit[:, :-1], out=is_new[:, 1:])
    row = np.arange(len(unit))[:, None] * banks
    load = np.bincount((row + (unit & (banks - 1)))[is_new], minlength=len(unit) * banks)
    return int(load.reshape(-1, banks).max(1).sum()) if len(unit) else 0
