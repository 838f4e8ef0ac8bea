"""Divergent threads, barriers, and threads that wait in vain."""

import numpy as np
import pytest
from ptx_kernels import run

from fusetune.sim import Deadlock, Divergence, SimError


def test_threads_take_both_sides_and_meet_again():
    out = np.zeros(32, np.uint32)
    counts = run(
        """
        setp.lt.u32 %q0, %tid, 10; @%q0 bra LOW;
        mul.lo.u32 %r0, %tid, 100; bra.uni JOIN;
        LOW: add.u32 %r0, %tid, 7;
        JOIN: activemask.b32 %r1; setp.ne.u32 %q1, %r1, 0xFFFFFFFF; @%q1 trap;
        add.s64 %d0, %p0, %off; st.global.b32 [%d0], %r0;
        """,
        out,
    )
    tid = np.arange(32)
    np.testing.assert_array_equal(out, np.where(tid < 10, tid + 7, tid * 100))
    # One warp: each side once, what follows once.
    assert counts.instructions["mul.lo.u32"] == 1
    assert counts.instructions["add.u32"] == 1
    assert counts.instructions["activemask.b32"] == 1


def test_loops_of_different_length():
    out = np.zeros(256, np.uint32)
    counts = run(
        """
        mov.b32 %r0, 0; mov.b32 %r1, 0;
        LOOP: setp.ge.u32 %q0, %r1, %tid; @%q0 bra DONE;
        add.u32 %r0, %r0, %r1; add.u32 %r1, %r1, 1; bra LOOP;
        DONE: activemask.b32 %r2; setp.ne.u32 %q1, %r2, 0xFFFFFFFF; @%q1 trap;
        mad.wide.u32 %d0, %tid, 4, %p0; st.global.b32 [%d0], %r0;
        """,
        out,
        threads=256,
    )
    tid = np.arange(256)
    np.testing.assert_array_equal(out, tid * (tid - 1) // 2)
    # A warp stays in the loop as long as its last thread.
    assert counts.instructions["add.u32"] == 2 * sum(32 * w + 31 for w in range(8))


def test_nested_divergence_within_a_loop():
    out = np.zeros(64, np.uint32)
    run(
        """
        mov.b32 %r0, 0; mov.b32 %r1, 0; and.b32 %r5, %tid, 7;
        LOOP: and.b32 %r2, %r1, 1; setp.eq.u32 %q0, %r2, 0; @%q0 bra EVEN;
        setp.lt.u32 %q1, %tid, 5; @%q1 bra NEXT; add.u32 %r0, %r0, 100; bra NEXT;
        EVEN: add.u32 %r0, %r0, 1;
        NEXT: add.u32 %r1, %r1, 1; setp.le.u32 %q2, %r1, %r5; @%q2 bra LOOP;
        mad.wide.u32 %d0, %tid, 4, %p0; st.global.b32 [%d0], %r0;
        """,
        out,
        threads=64,
    )
    expected = []
    for tid in range(64):
        turns = (tid & 7) + 1
        expected.append((turns + 1) // 2 + (0 if tid < 5 else turns // 2 * 100))
    assert out.tolist() == expected


def test_early_exit():
    out = np.zeros(96, np.uint32)
    run(
        "setp.ge.u32 %q0, %tid, 40; @%q0 exit; mad.wide.u32 %d0, %tid, 4, %p0;"
        "bar.sync 0; st.global.b32 [%d0], 1;",
        out,
        threads=96,
    )
    assert out.sum() == 40


def test_blocks_that_do_not_fill_their_last_warp():
    out = np.zeros(50, np.uint32)
    counts = run(
        "setp.ge.u32 %q0, %tid, 0; vote.sync.ballot.b32 %r0, %q0, 0xFFFFFFFF;"
        "mad.wide.u32 %d0, %tid, 4, %p0; bar.sync 0; st.global.b32 [%d0], %r0;",
        out,
        threads=50,
    )
    assert (out[:32] == 0xFFFFFFFF).all()
    assert (out[32:] == (1 << 18) - 1).all()
    assert counts.barriers == 1
    assert counts.global_store_bytes == 200


EXCHANGE = """
    .shared .align 4 .b32 s[256]; mov.u32 %r0, s; mad.lo.u32 %r1, %tid, 4, %r0;
    st.shared.b32 [%r1], %tid; {barrier}
    sub.u32 %r2, 255, %tid; mad.lo.u32 %r3, %r2, 4, %r0; ld.shared.b32 %r4, [%r3];
    mov.u32 %r5, %ctaid.x; mad.lo.u32 %r5, %r5, 256, %tid;
    mad.wide.u32 %d0, %r5, 4, %p0; st.global.b32 [%d0], %r4;
"""


@pytest.mark.parametrize(
    "barrier", ["bar.sync 0;", "barrier.cta.sync.aligned 0;", "bar.sync 1, 256;"]
)
def test_barrier(barrier):
    out = np.zeros(512, np.uint32)
    counts = run(EXCHANGE.format(barrier=barrier), out, threads=256, ctas=2)
    np.testing.assert_array_equal(out, np.tile(np.arange(256)[::-1], 2))
    assert counts.barriers == 2


def test_barrier_reached_over_different_paths():
    out = np.zeros(256, np.uint32)
    barrier = """
    setp.lt.u32 %q0, %tid, 128; @%q0 bra FIRST; bar.sync 0; bra AFTER; FIRST: bar.sync 0; AFTER:
    """
    run(EXCHANGE.format(barrier=barrier), out, threads=256)
    np.testing.assert_array_equal(out, np.arange(256)[::-1])


def test_barriers_of_ctas_are_their_own():
    """CTAs pass different numbers of barriers."""
    out = np.zeros(8, np.uint32)
    counts = run(
        """
        mov.u32 %r0, %ctaid.x; mov.b32 %r1, 0;
        LOOP: bar.sync 0; add.u32 %r1, %r1, 1; setp.le.u32 %q0, %r1, %r0; @%q0 bra LOOP;
        mad.wide.u32 %d0, %r0, 4, %p0; st.global.b32 [%d0], %r1;
        """,
        out,
        threads=64,
        ctas=8,
    )
    assert out.tolist() == list(range(1, 9))
    assert counts.barriers == sum(range(1, 9))


def test_barrier_that_some_threads_never_reach():
    with pytest.raises(Deadlock, match=r"not all threads reach; `bar.sync 0`.*thread 0 "):
        run(
            """
            setp.lt.u32 %q0, %tid, 32; @%q0 bra FIRST; bar.sync 1; bra AFTER;
            FIRST: bar.sync 0; AFTER:
            """,
            threads=64,
        )


def test_predicated_barrier():
    run("setp.lt.u32 %q0, %tid, 32; @%q0 bar.sync 0; @!%q0 bar.sync 0;", threads=64)
    run("setp.lt.u32 %q0, %tid, 32; @%q0 bar.sync 0; @!%q0 exit;", threads=64)
    with pytest.raises(Deadlock):
        run("setp.lt.u32 %q0, %tid, 32; @%q0 bar.sync 0; @!%q0 bar.sync 1;", threads=64)


def test_half_a_warp_at_the_barrier_and_half_waiting_for_the_warp():
    with pytest.raises(Divergence):
        run(
            "setp.lt.u32 %q0, %tid, 16; @%q0 bra A; bar.warp.sync 0xFFFFFFFF; bra B;"
            "A: bar.sync 0; B:",
            threads=32,
        )


def test_a_barrier_of_some_threads_is_refused():
    with pytest.raises(SimError, match="a barrier of 64 of the CTA's 128 threads"):
        run("bar.sync 1, 64;", threads=128)


def test_warp_instructions_wait_for_the_threads_they_name():
    """A block behind the join that jumps back to it: lowest-first scheduling comes too early."""
    out = np.zeros(32, np.uint32)
    run(
        """
        mov.b32 %r0, 1; setp.eq.u32 %q0, %tid, 3; @%q0 bra COLD;
        JOIN: shfl.sync.idx.b32 %r1, %r0, 3, 31, 0xFFFFFFFF;
        add.s64 %d0, %p0, %off; st.global.b32 [%d0], %r1; ret;
        COLD: mov.b32 %r0, 42; bra JOIN;
        """,
        out,
    )
    assert (out == 42).all()


def test_naming_threads_that_never_come():
    with pytest.raises(Divergence, match="names threads that do not arrive"):
        run(
            """
            setp.lt.u32 %q0, %tid, 16; @%q0 bra A; bra B;
            A: shfl.sync.idx.b32 %r1, %tid, 0, 31, 0xFFFFFFFF; bra END;
            B: shfl.sync.idx.b32 %r1, %tid, 0, 31, 0xFFFFFFFF;
            END:
            """
        )
    with pytest.raises(Divergence):
        run("setp.lt.u32 %q0, %tid, 16; @%q0 shfl.sync.idx.b32 %r1, %tid, 0, 31, 0xFFFFFFFF;")


def test_a_part_of_the_warp_by_its_mask():
    out = np.zeros(32, np.uint32)
    run(
        """
        mov.b32 %r1, 99; setp.ge.u32 %q0, %tid, 16; @%q0 bra END;
        shfl.sync.bfly.b32 %r1, %tid, 1, 31, 0xFFFF;
        END: add.s64 %d0, %p0, %off; st.global.b32 [%d0], %r1;
        """,
        out,
    )
    assert out.tolist() == [i ^ 1 for i in range(16)] + [99] * 16


def test_trap():
    run("setp.gt.u32 %q0, %tid, 31; @%q0 trap;")
    with pytest.raises(SimError, match="trapped"):
        run("setp.gt.u32 %q0, %tid, 30; @%q0 trap;")


def test_ids_of_threads_and_ctas():
    from fusetune.sim.ptx import Program

    names = ["%tid.x", "%tid.y", "%tid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z"]
    names += ["%ntid.x", "%ntid.y", "%ntid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z"]
    stores = "".join(
        f"mov.u32 %v, {name}; st.global.b32 [%a+{4 * i}], %v;" for i, name in enumerate(names)
    )
    text = f""".version 8.7\n.target sm_80\n.address_size 64
    .entry k(.param .u64 out) {{ .reg .b32 %v, %n, %t<8>; .reg .b64 %a, %o;
    mov.u32 %t0, %tid.x; mov.u32 %t1, %tid.y; mov.u32 %t2, %tid.z;
    mov.u32 %t3, %ctaid.x; mov.u32 %t4, %ctaid.y; mov.u32 %t5, %ctaid.z;
    mad.lo.u32 %n, %t5, 2, %t4; mad.lo.u32 %n, %n, 3, %t3;
    mad.lo.u32 %n, %n, 2, %t2; mad.lo.u32 %n, %n, 3, %t1; mad.lo.u32 %n, %n, 4, %t0;
    ld.param.u64 %o, [out]; mad.wide.u32 %a, %n, 48, %o; {stores} ret; }}"""
    out = np.zeros((2, 2, 3, 2, 3, 4, 12), np.uint32)  # CTA z, y, x; thread z, y, x
    Program(text).launch("k", (3, 2, 2), (4, 3, 2), [out])
    cz, cy, cx, tz, ty, tx = np.indices(out.shape[:-1])
    for i, expected in enumerate([tx, ty, tz, cx, cy, cz, 4, 3, 2, 3, 2, 2]):
        np.testing.assert_array_equal(out[..., i], np.broadcast_to(expected, out.shape[:-1]))
