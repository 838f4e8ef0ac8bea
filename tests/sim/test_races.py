"""Shared-memory races, with and without cp.async: what is reported and what must not be."""

import numpy as np
import pytest
from ptx_kernels import run

from fusetune.sim import Race

ADDRESS = (
    ".shared .align 16 .b8 s[4096]; mov.u32 %r0, s; mad.lo.u32 %r1, %tid, 4, %r0;"
    "xor.b32 %r2, %r1, 128;"  # the place of the same lane in the neighbouring warp
)


def two_warps(body, *arrays, check=True):
    return run(ADDRESS + body, *arrays, threads=64, check=check)


def test_reading_what_another_warp_writes():
    body = "st.shared.b32 [%r1], %tid; {} ld.shared.b32 %r3, [%r2];"
    with pytest.raises(
        Race, match="this load and an access of another warp since the last barrier"
    ):
        two_warps(body.format(""))
    with pytest.raises(Race):
        two_warps(body.format("bar.warp.sync -1;"))
    two_warps(body.format("bar.sync 0;"))
    two_warps(body.format(""), check=False)


def test_overwriting_what_another_warp_reads():
    body = (
        "st.shared.b32 [%r1], %tid; bar.sync 0; ld.shared.b32 %r3, [%r2]; {}"
        "st.shared.b32 [%r1], %r3;"
    )
    with pytest.raises(Race, match="this store"):
        two_warps(body.format(""))
    two_warps(body.format("bar.sync 0;"))


def test_two_warps_write_the_same_place():
    with pytest.raises(Race):
        two_warps("st.shared.b32 [s], %tid;")
    with pytest.raises(Race):  # one after the other
        two_warps(
            "setp.lt.u32 %q0, %tid, 32; setp.eq.u32 %q1, %lane, 0; and.pred %q2, %q0, %q1;"
            "@%q2 st.shared.b32 [s], %tid; not.pred %q0, %q0; and.pred %q2, %q0, %q1;"
            "@%q2 st.shared.b32 [s], %tid;"
        )


def test_a_warp_may_do_as_it_likes_with_its_own():
    two_warps("st.shared.b32 [%r1], %tid; ld.shared.b32 %r3, [%r1]; st.shared.b32 [%r1], %r3;")


def test_both_warps_may_read_the_same():
    body = """
    setp.eq.u32 %q0, %tid, 0; @%q0 st.shared.b32 [s], %tid; bar.sync 0;
    ld.shared.b32 %r3, [s]; {} @%q0 st.shared.b32 [s], %tid;
    """
    with pytest.raises(Race):  # the second reader is not forgotten over the first
        two_warps(body.format(""))
    two_warps(body.format("bar.sync 0;"))


@pytest.mark.parametrize("writer", ["%q1", "%q2"])
def test_readers_one_after_the_other_are_all_remembered(writer):
    body = """
    setp.eq.u32 %q0, %tid, 0; @%q0 st.shared.b32 [s], %tid; bar.sync 0;
    setp.lt.u32 %q1, %tid, 32; @%q1 ld.shared.b32 %r3, [s];
    not.pred %q2, %q1; @%q2 ld.shared.b32 %r3, [s]; BARRIER WRITER st.shared.b32 [s], 1;
    """.replace("WRITER", f"@{writer}")
    with pytest.raises(Race):  # whichever warp writes, the other has read
        two_warps(body.replace("BARRIER", ""))
    two_warps(body.replace("BARRIER", "bar.sync 0;"))


def test_neighbouring_halves_of_a_word_are_different_places():
    two_warps("mad.lo.u32 %r3, %tid, 2, %r0; mov.b16 %h0, 1; st.shared.b16 [%r3], %h0;")
    # Warps write alternate halfwords of the same words.
    two_warps(
        "shr.u32 %r3, %tid, 5; mad.lo.u32 %r4, %lane, 4, %r0; mad.lo.u32 %r4, %r3, 2, %r4;"
        "mov.b16 %h0, 1; st.shared.b16 [%r4], %h0;"
    )


def test_wide_accesses_are_tracked_in_all_their_parts():
    body = (
        "mad.lo.u32 %r3, %tid, 16, %r0; st.shared.v4.b32 [%r3], {%tid, %tid, %tid, %tid};"
        "xor.b32 %r4, %r3, 524; ld.shared.b32 %r5, [%r4];"
    )
    with pytest.raises(Race):
        two_warps(body)


def test_ctas_do_not_race_with_one_another():
    run(ADDRESS + "st.shared.b32 [%r1], %tid; ld.shared.b32 %r3, [%r1];", threads=32, ctas=4)


def test_atomics_among_themselves_and_with_stores():
    zero = "setp.eq.u32 %q0, %tid, 0; mov.b32 %r3, 0; @%q0 st.shared.b32 [s], %r3;"
    two_warps(zero + "bar.sync 0; red.shared.add.u32 [s], 1; red.shared.add.u32 [s], 1;")
    with pytest.raises(Race):
        two_warps(zero + "red.shared.add.u32 [s], 1;")
    with pytest.raises(Race):
        two_warps(zero + "bar.sync 0; red.shared.add.u32 [s], 1; @%q0 st.shared.b32 [s], %r3;")


COPY = "mad.wide.u32 %d0, %tid, 16, %p0; mad.lo.u32 %r3, %tid, 16, %r0;" + (
    "cp.async.cg.shared.global [%r3], [%d0], 16; cp.async.commit_group;"
)
READ_OTHER = "xor.b32 %r4, %r3, 512; ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r4];"
READ_OWN = "ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r3];"
DATA = np.arange(256, dtype=np.uint32)


def test_cp_async_copies():
    out = np.zeros(256, np.uint32)
    two_warps(
        COPY
        + "cp.async.wait_group 0; bar.sync 0;"
        + READ_OTHER
        + "mad.wide.u32 %d1, %tid, 16, %p1; st.global.v4.b32 [%d1], {%r5, %r6, %r7, %r8};",
        DATA,
        out,
    )
    np.testing.assert_array_equal(out.reshape(2, 128), DATA.reshape(2, 128)[::-1])


def test_cp_async_without_the_wait():
    with pytest.raises(Race, match=r"cp\.async not waited for"):
        two_warps(COPY + "bar.sync 0;" + READ_OTHER, DATA)
    with pytest.raises(Race, match=r"cp\.async not waited for"):
        two_warps(COPY + READ_OWN, DATA)


def test_cp_async_without_the_barrier():
    with pytest.raises(Race):
        two_warps(COPY + "cp.async.wait_group 0;" + READ_OTHER, DATA)
    two_warps(COPY + "cp.async.wait_group 0;" + READ_OWN, DATA)  # one's own copy needs none


def test_cp_async_over_what_is_being_read():
    body = COPY + "cp.async.wait_all; bar.sync 0;" + READ_OTHER + "BARRIER" + COPY
    with pytest.raises(Race, match=r"this cp\.async"):
        two_warps(body.replace("BARRIER", ""), DATA)
    two_warps(body.replace("BARRIER", "bar.sync 0;"), DATA)


def test_wait_group_leaves_the_last_groups_under_way():
    second = COPY.replace("[%r3]", "[%r3+1024]")
    two_warps(COPY + second + "cp.async.wait_group 1;" + READ_OWN, DATA)
    with pytest.raises(Race):
        two_warps(
            COPY + second + "cp.async.wait_group 1;" + READ_OWN.replace("%r3]", "%r3+1024]"), DATA
        )
    with pytest.raises(Race):
        two_warps(COPY + second + "cp.async.wait_group 2;" + READ_OWN, DATA)


def test_wait_group_does_not_wait_for_what_was_not_committed():
    uncommitted = COPY.replace("cp.async.commit_group;", "")
    with pytest.raises(Race):
        two_warps(uncommitted + "cp.async.wait_group 0;" + READ_OWN, DATA)
    two_warps(uncommitted + "cp.async.wait_all;" + READ_OWN, DATA)


def test_cp_async_fills_with_zeros_where_it_reads_nothing():
    out = np.full(256, 9, np.uint32)
    body = """
    setp.lt.u32 %q0, %tid, 20; selp.b32 %r9, 16, 0, %q0; mad.lo.u32 %r3, %tid, 16, %r0;
    mad.wide.u32 %d0, %tid, 16, %p0;
    cp.async.cg.shared.global [%r3], [%d0], 16, %r9; cp.async.wait_all;
    """
    counts = two_warps(
        body
        + READ_OWN
        + "mad.wide.u32 %d1, %tid, 16, %p1; st.global.v4.b32 [%d1], {%r5, %r6, %r7, %r8};",
        DATA[:80].copy(),  # what is not read need not be there
        out,
    )
    np.testing.assert_array_equal(out, np.where(np.arange(256) < 80, DATA, 0))
    assert counts.global_load_bytes == 20 * 16
