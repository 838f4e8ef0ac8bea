"""Counters on access patterns whose cost is known by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_kernels import run

from fusetune.sim.ptx import traffic

BIG = np.zeros(1 << 14, np.uint8)
ALIGNED = BIG[-BIG.ctypes.data % 128 :][: 1 << 13]  # starts a line of 128 bytes


def global_load(stride, size=4, offset=0, guard=""):
    """A load of `size` bytes by every thread of a warp, `stride` apart."""
    kind = {1: "u8", 2: "u16", 4: "b32", 8: "v2.b32", 16: "v4.b32"}[size]
    target = {8: "{%r1, %r2}", 16: "{%r1, %r2, %r3, %r4}", 1: "%h0", 2: "%h0"}.get(size, "%r1")
    return run(
        f"setp.lt.u32 %q0, %tid, 4; mad.wide.u32 %d0, %tid, {stride}, %p0;"
        f"{guard} ld.global.{kind} {target}, [%d0+{offset}];",
        ALIGNED,
    )


@pytest.mark.parametrize(
    ("stride", "size", "offset", "sectors"),
    [
        (4, 4, 0, 4),  # 128 bytes in a row
        (4, 4, 16, 5),  # the same across sectors
        (0, 4, 0, 1),  # all the same word
        (32, 4, 0, 32),  # a sector each
        (8, 4, 0, 8),
        (2, 2, 0, 2),
        (1, 1, 0, 1),
        (8, 8, 0, 8),
        (16, 16, 0, 16),
        (128, 16, 0, 32),
    ],
)
def test_sectors(stride, size, offset, sectors):
    counts = global_load(stride, size, offset)
    assert counts.global_load_sectors == sectors
    assert counts.global_load_requests == 1
    assert counts.global_load_bytes == 32 * size
    assert counts.global_store_sectors == 0


def test_sectors_of_some_threads():
    counts = global_load(32, guard="@%q0")
    assert (counts.global_load_requests, counts.global_load_sectors) == (1, 4)
    assert counts.global_load_bytes == 16
    counts = global_load(32, guard="setp.gt.u32 %q0, %tid, 40; @%q0")
    assert (counts.global_load_requests, counts.global_load_sectors) == (0, 0)


def test_sectors_of_stores_and_of_cp_async():
    counts = run("add.s64 %d0, %p0, %off; st.global.b32 [%d0], %tid;", ALIGNED)
    assert (counts.global_store_sectors, counts.global_store_bytes) == (4, 128)
    assert counts.global_load_sectors == 0
    counts = run(
        ".shared .align 16 .b8 s[512]; mov.u32 %r0, s; mad.lo.u32 %r0, %tid, 16, %r0;"
        "mad.wide.u32 %d0, %tid, 16, %p0; cp.async.cg.shared.global [%r0], [%d0], 16;",
        ALIGNED,
    )
    assert (counts.global_load_sectors, counts.global_load_bytes) == (16, 512)
    assert counts.shared_store_wavefronts == 4


def shared_load(stride, size):
    kind = {1: "u8", 2: "u16", 4: "b32", 8: "v2.b32", 16: "v4.b32"}[size]
    target = {8: "{%r1, %r2}", 16: "{%r1, %r2, %r3, %r4}", 1: "%h0", 2: "%h0"}.get(size, "%r1")
    counts = run(
        f".shared .align 16 .b8 s[16384]; mov.u32 %r0, s; mad.lo.u32 %r0, %tid, {stride}, %r0;"
        f"ld.shared.{kind} {target}, [%r0];",
        check=False,
    )
    assert counts.shared_load_requests == 1
    return counts.shared_load_wavefronts


@pytest.mark.parametrize(
    ("stride", "size", "wavefronts"),
    [
        (4, 4, 1),  # a bank each
        (0, 4, 1),  # one word for all
        (8, 4, 2),
        (128, 4, 32),  # all in one bank
        (132, 4, 1),  # the classic padding
        (12, 4, 1),  # odd strides in words are free of conflicts
        (2, 2, 1),  # two threads a word
        (1, 1, 1),
        (64, 4, 16),
        (8, 8, 2),  # two half-warps
        (16, 8, 4),
        (16, 16, 4),  # four quarters
        (32, 16, 8),
        (128, 16, 32),
        (144, 16, 4),  # padding for ldmatrix
    ],
)
def test_wavefronts(stride, size, wavefronts):
    assert shared_load(stride, size) == wavefronts


def test_wavefronts_of_ldmatrix():
    body = """
    .shared .align 16 .b8 s[8192]; mov.u32 %r0, s; mad.lo.u32 %r0, %lane, {stride}, %r0;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r1, %r2, %r3, %r4}}, [%r0];
    """
    for stride, wavefronts in ((16, 4), (128, 32), (144, 4), (64, 16)):
        counts = run(body.format(stride=stride), check=False)
        assert counts.shared_load_wavefronts == wavefronts
        assert counts.shared_load_requests == 1


LANES = st.lists(st.integers(0, 200), min_size=32, max_size=32)
ACTIVE = st.one_of(st.none(), st.lists(st.booleans(), min_size=32, max_size=32))


@given(LANES, ACTIVE, st.sampled_from([4, 8, 16]))
@settings(max_examples=200, deadline=None)
def test_any_pattern_against_the_definition(units, active, size):
    address = np.array(units) * size
    mask = None if active is None else np.array(active)
    taking_part = [i for i in range(32) if mask is None or mask[i]]
    request = int(bool(taking_part))

    sectors = {int(address[i]) // 32 for i in taking_part}
    assert traffic.sectors(address, mask) == (request, len(sectors))

    group = 128 // size
    waves = 0
    for start in range(0, 32, group):
        lanes = [i for i in taking_part if start <= i < start + group]
        words = {int(address[i]) // 4 + j for i in lanes for j in range(size // 4)}
        per_bank = [sum(word % 32 == bank for word in words) for bank in range(32)]
        waves += max(per_bank)
    assert traffic.wavefronts(address, size, mask) == (request, waves)


def test_instructions_are_counted_once_per_warp():
    counts = run(
        "setp.lt.u32 %q0, %tid, 40; @!%q0 bra END; add.u32 %r0, %tid, 1;END: add.u32 %r1, %tid, 2;",
        threads=96,
        ctas=5,
    )
    assert counts.instructions["add.u32"] == 5 * (2 + 3)
    assert counts.instructions["bra"] == 5 * 3
    assert counts.warp_instructions == sum(counts.instructions.values())


def test_counts_do_not_depend_on_how_many_ctas_run_at_once(monkeypatch):
    from fusetune.sim.ptx import program

    def counted():
        return run(
            "mov.u32 %r0, %ctaid.x; mad.lo.u32 %r1, %r0, 64, %tid; mad.wide.u32 %d0, %r1, 4, %p0;"
            "ld.global.b32 %r2, [%d0]; bar.sync 0; st.global.b32 [%d0], %r2;",
            ALIGNED.view(np.uint32),
            threads=64,
            ctas=20,
        )

    together = counted()
    monkeypatch.setattr(program, "_BATCH", 64)
    assert counted() == together
    assert together.global_load_sectors == 20 * 8
    assert together.barriers == 20
