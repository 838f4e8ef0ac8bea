"""The bytes that the LoRA kernels move, counted by the simulator and scaled to a large layer.

Every kernel's traffic is a formula below. At small sizes the simulator's counters must equal it to
the byte; then it is evaluated for one 4096 x 4096 linear layer, NF4 with nested statistics, r = 16,
4096 tokens, all in bf16. For comparison, by the same rules: PEFT with bitsandbytes 900 MB, Unsloth
632 MB; 220 MB if W were never written.

What is counted: dense operands of the two matmuls once each, as tiles share them in the cache; of
everything else what a launch loads or stores, once. `again` is what several programs of a launch
load of the same few hundred kB, which the cache holds: the counters have it, and a second limit.
"""

from typing import NamedTuple

import pytest
import torch
from backends import simulated
from lora_cases import leaves, quantized

from fusetune import ops

pytest.importorskip("triton")

BF16 = torch.bfloat16
SECTOR = 32


class Bytes(NamedTuple):
    load: int
    store: int
    again: int = 0


def plans(m, n, k, r):
    """(blocks, parts) of the three kernels with narrow results, from the launchers' own tables."""
    from fusetune._triton import _tile, lora_da, lora_ds_db, lora_shrink

    rows, cols, _, _ = lora_shrink._tiles(BF16, 1, _tile.rank_block(r), 1, None)
    shrink = -(-m // rows), *_tile.splits(-(-m // rows), -(-k // cols))[:1]
    rows, cols, _ = lora_ds_db._tiles(BF16, _tile.rank_block(r), 1)
    blocks = -(-n // cols)
    ds_db = blocks, *_tile.splits(blocks, -(-m // rows), _tile.PROGRAMS // 2)[:1]
    rows, cols, _, _ = lora_da._tiles(BF16, _tile.rank_block(r), None, 1, 1)
    da = -(-k // cols), *_tile.splits(-(-k // cols), -(-m // rows))[:1]
    return shrink, ds_db, da


def expected(m, n, k, r):
    """Bytes of every launch but the two matmuls, forward and backward, in their order."""
    (row_blocks, k_parts), (col_blocks, m_ranges), (k_blocks, m_parts) = plans(m, n, k, r)
    s, a, b = 4 * m * r, 2 * r * k, 2 * n * r  # s is fp32, the adapters bf16
    launches = [("_shrink", Bytes(2 * m * k + a, k_parts * s, (row_blocks - 1) * a))]
    if k_parts > 1:
        launches.append(("_sum_parts", Bytes(k_parts * s, s)))
    launches.append(("_dequantize", dequantize(n * k)))
    backward = [
        (
            "_ds_db",
            Bytes(
                2 * m * n + s + b,
                col_blocks * s + m_ranges * 2 * b,
                (col_blocks - 1) * s + (m_ranges - 1) * b,
            ),
        ),
        ("_sum_parts", Bytes(col_blocks * s, s)),
        ("_sum_parts", Bytes(m_ranges * 2 * b, b)),
        ("_da", Bytes(2 * m * k + s, m_parts * 2 * a, (k_blocks - 1) * s)),
        ("_sum_parts", Bytes(m_parts * 2 * a, a)),
        ("_dequantize", dequantize(n * k)),
    ]
    return launches + backward


def dequantize(elements):
    """A nested NF4 weight to bf16. A program loads its tables; each of its 8 warps a sector of the
    codebook's two, of the offset's, and of a tile's nested absmax."""
    from fusetune._triton.dequantize_4bit import TILE

    tiles = -(-elements // (8 * TILE))
    programs = -(-tiles // (4 if tiles >= 512 else 1))
    once = elements // 2 + elements // 64 + elements // 64 // 64 + 1024 + 64 + SECTOR
    executed = (
        elements // 2 + elements // 64 + programs * (1024 + 8 * 3 * SECTOR) + tiles * 8 * SECTOR
    )
    return Bytes(once, 2 * elements, executed - once)


def matmul(m, n, k, r):
    """x or dY, W and y or dX once; and the adapter's factors."""
    return 2 * (m * k + n * k + m * n) + 4 * m * r + 2 * n * r


def run(m, n, k, r, dropout_p=0.0):
    """The launches of a forward and backward pass."""
    with simulated("triton-sim") as simulation:
        arguments = leaves(
            {
                "x": torch.randn(m, k).to(BF16),
                "lora_A": torch.randn(r, k).to(BF16),
                "lora_B": torch.randn(n, r).to(BF16),
            }
        )
        weight = quantized(torch.randn(n, k), double_quant=True)
        y = ops.lora_linear(**arguments, weight=weight, scaling=1.0, dropout_p=dropout_p)
        y.backward(torch.randn(m, n).to(BF16))
    return simulation.launches


@pytest.mark.parametrize("sizes", [(512, 512, 512, 16), (256, 1024, 512, 16), (1024, 512, 256, 16)])
def test_the_formula_is_what_the_counters_say(sizes):
    counted = [
        (
            launch.kernel,
            SECTOR * launch.counts.global_load_sectors,
            SECTOR * launch.counts.global_store_sectors,
        )
        for launch in run(*sizes)
        if launch.kernel != "_linear"
    ]
    formula = [(name, b.load + b.again, b.store) for name, b in expected(*sizes)]
    assert counted == formula


def test_a_large_layer_moves_less_than_400_mb():
    m = n = k = 4096
    launches = [b for _, b in expected(m, n, k, 16)]
    matmuls = matmul(m, n, k, 16) + matmul(m, k, n, 16)
    once = matmuls + sum(b.load + b.store for b in launches)
    assert once <= 400e6, once
    assert once + sum(b.again for b in launches) <= 430e6


def test_dequantisation_moves_what_it_has_to():
    """At 4096 x 4096: 1.02 times the weight in, the weight out, all that programs load counted."""
    elements = 4096 * 4096
    compulsory = elements // 2 + elements // 64 + 4 * elements // 64 // 256 + 2 * elements
    moved = dequantize(elements)
    assert moved.load + moved.again + moved.store <= 1.02 * compulsory


def test_dropout_adds_no_bytes_that_grow(monkeypatch):
    """Each warp loads the seed: nothing else, whatever M and K."""
    from fusetune._triton import lora_da, lora_shrink

    for module in (lora_shrink, lora_da):  # with dropout tiles are smaller: cut otherwise
        monkeypatch.setattr(module, "splits", lambda blocks, steps: (1, steps))
    for m, k in ((256, 512), (512, 512), (256, 1024)):
        plain, dropped = (
            {launch.kernel: launch for launch in run(m, 256, k, 16, p)} for p in (0.0, 0.3)
        )
        for kernel, warps in (("_shrink", 4), ("_da", 4), ("_linear", 8)):
            before, after = plain[kernel], dropped[kernel]
            assert after.grid == before.grid
            assert after.counts.global_store_sectors == before.counts.global_store_sectors
            more = after.counts.global_load_sectors - before.counts.global_load_sectors
            assert more == after.grid[0] * after.grid[1] * warps, kernel
