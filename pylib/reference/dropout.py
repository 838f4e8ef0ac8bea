"""Dropout by counter: the mask is a function of (seed, position), so it is never stored.

Every backend reproduces this mask bit for bit. Element (row, col) of a [M, K] matrix has
index = row * K + col and draws word index % 4 of Philox4x32-10 (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3") with counter (block low, block high, 0, 0), block = index // 4,
and key (seed low, seed high). It is kept when the word is at least `threshold`, and then multiplied
by 1 / (1 - p) in fp32. This is the generator behind Triton's `tl.randint4x`.
"""

import math

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def new_seed(device: torch.device, count: int = 1) -> torch.Tensor:
    """A seed, int64 [1], or several, from torch's default generator of `device`.

    Being drawn there it obeys torch.manual_seed, and gradient checkpointing, which restores the
    generator before it recomputes a layer, draws it again.
    """
    return torch.randint(0, 2**63 - 1, (count,), dtype=torch.int64, device=device)


def threshold_and_scale(p: float) -> tuple[int, float]:
    """(smallest 32-bit word that is kept, factor of kept values); factor 0 drops all (p = 1)."""
    threshold = min(math.floor(p * 2**32), _WORD)
    return threshold, 0.0 if p == 1 else 1 / (1 - p)


def philox(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> list[torch.Tensor]:
    """Philox4x32-10. counter: four int64 tensors of 32-bit words. Returns four such tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The int64 product wraps, which leaves its bits right; the mask undoes the shift's sign.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return [c0, c1, c2, c3]


def keep_mask(
    rows: int, cols: int, p: float, seed: torch.Tensor, first_row: int = 0
) -> torch.Tensor:
    """Which elements of a [rows, cols] matrix are kept: bool [rows, cols] on the seed's device.

    first_row: of the whole matrix, where this is but a block of its rows.
    """
    value = int(seed)
    first, count = first_row * cols, rows * cols
    block = torch.arange(first // 4, (first + count + 3) // 4, device=seed.device)
    zero = torch.zeros_like(block)
    words = philox((block & _WORD, block >> 32, zero, zero), (value & _WORD, value >> 32))
    words_here = torch.stack(words, 1).flatten()[first % 4 :][:count]
    return (words_here >= threshold_and_scale(p)[0]).view(rows, cols)


def dropout(
    x: torch.Tensor, p: float, seed: torch.Tensor | None, first_row: int = 0
) -> torch.Tensor:
    """x [M, K] with dropout applied, in x's dtype. No seed: x itself. first_row: as above."""
    if seed is None:
        return x
    scale = torch.tensor(threshold_and_scale(p)[1], dtype=torch.float32, device=x.device)
    kept = (
        x * scale if x.dtype in (torch.float32, torch.float64) else (x.float() * scale).to(x.dtype)
    )
    return torch.where(keep_mask(x.shape[0], x.shape[1], p, seed, first_row), kept, 0)
