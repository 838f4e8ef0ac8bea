"""What a cache lets through, on accesses whose traffic is known by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ptx_kernels import module

from fusetune.sim.ptx import Program, traffic
from fusetune.sim.ptx.trace import Trace

SECTOR = traffic.SECTOR
LARGE = 1 << 20


def traced(*accesses):
    """A trace of accesses by one warp, each to one sector: "r3" reads sector 3, "w3" writes it."""
    trace = Trace()
    for access in accesses:
        address = np.full(32, SECTOR * int(access[1:]), np.int64)
        trace.note(address, None, access[0] == "w")
    return trace


@pytest.mark.parametrize(
    ("accesses", "sectors", "moved"),
    [
        ("", 9, 0),
        ("r1", 9, 1),
        ("r1 r1 r2 r1", 9, 2),  # what is there is not read again
        ("w1", 9, 1),
        ("w1 w1 w1", 9, 1),  # written back once
        ("w1 r1", 9, 1),  # not read: it was written here
        ("r1 w1", 9, 2),  # read, and written back
        ("r1 r2 r1", 1, 3),  # no room for two
        ("r1 r2 r1", 2, 2),
        ("r1 r2 r1 r3 r1 r2", 2, 4),  # 2 had to go, which was not used for longest
        ("w1 r2 r3 w1", 2, 4),  # 1 is written back twice
        ("w1 r2 r3 r1", 2, 4),  # written back, and read
    ],
)
def test_what_passes_through_a_cache(accesses, sectors, moved):
    assert traced(*accesses.split()).memory_sectors(sectors * SECTOR) == moved


@given(st.lists(st.integers(0, 200), min_size=64, max_size=64), st.integers(0, 2**64 - 1))
def test_sectors_touched(words, bits):
    address = 4 * np.array(words, np.int64)
    mask = np.array([bits >> i & 1 for i in range(64)], np.bool_)
    for taking_part in (mask, None):
        expected = []
        for warp in range(2):
            lanes = range(32 * warp, 32 * warp + 32)
            active = [i for i in lanes if taking_part is None or taking_part[i]]
            expected += sorted({int(address[i]) // SECTOR for i in active})
        found = traffic.touched(address, taking_part)
        assert found.tolist() == expected
        assert len(found) == traffic.sectors(address, taking_part)[1]


def test_a_launch_is_traced():
    """Each of 20 CTAs reads the same 128 bytes, and writes 128 of its own."""
    source, target = (np.zeros(1024 + 32, np.uint32) for _ in range(2))
    source, target = (a[-a.ctypes.data // 4 % 32 :] for a in (source, target))
    body = (
        "add.s64 %d0, %p0, %off; ld.global.b32 %r2, [%d0];"
        "mov.u32 %r0, %ctaid.x; mad.lo.u32 %r1, %r0, 32, %tid; mad.wide.u32 %d1, %r1, 4, %p1;"
        "st.global.b32 [%d1], %r2;"
    )
    program, trace = Program(module(body, 2)), Trace()
    launch = ("kernel", (20, 1, 1), (32, 1, 1), (source, target))
    counts = program.launch(*launch, trace=trace)
    assert counts.global_sectors == 20 * 4 + 20 * 4
    assert trace.memory_sectors(LARGE) == 4 + 20 * 4
    program.launch(*launch)  # not traced
    assert trace.memory_sectors(LARGE) == 4 + 20 * 4
