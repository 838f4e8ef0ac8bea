"""Exchange within a warp, from the manual's definitions."""

import numpy as np
import pytest
from ptx_kernels import run

from fusetune.sim import SimError

VALUES = (np.arange(64, dtype=np.uint32) * 7919) % 101
STORE = "add.s64 %d1, %p1, %off; st.global.b32 [%d1], %r1;"
LOAD = "add.s64 %d0, %p0, %off; ld.global.b32 %r0, [%d0];"


def exchanged(code):
    out = np.zeros(64, np.uint32)
    run(LOAD + code + STORE, VALUES, out, threads=64)
    return out


def shuffled(mode, by, control):
    """(values, whether in range) by the pseudocode of shfl."""
    values, valid = [], []
    for thread in range(64):
        lane, base = thread % 32, thread // 32 * 32
        segment, clamp = control >> 8 & 31, control & 31
        low = lane & segment
        high = low | (clamp & ~segment & 31)
        source = {
            "up": lane - by,
            "down": lane + by,
            "bfly": lane ^ by,
            "idx": low | (by & ~segment & 31),
        }[mode]
        inside = source >= high if mode == "up" else source <= high
        valid.append(inside)
        values.append(VALUES[base + (source if inside else lane)])
    return np.array(values, np.uint32), np.array(valid)


@pytest.mark.parametrize("control", [31, 0x1C03, 0x1000 | 15, 0])
@pytest.mark.parametrize("by", [0, 1, 3, 16, 31])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode, by, control):
    if mode == "up":
        control &= ~31  # the clamp of `up` is the lowest lane
    values, valid = shuffled(mode, by, control)
    out = exchanged(f"shfl.sync.{mode}.b32 %r1|%q1, %r0, {by}, {control}, -1;")
    np.testing.assert_array_equal(out, values)
    code = f"shfl.sync.{mode}.b32 %r2|%q1, %r0, {by}, {control}, -1; selp.b32 %r1, 1, 0, %q1;"
    np.testing.assert_array_equal(exchanged(code), valid)


def test_shfl_with_a_source_of_every_thread():
    out = exchanged("sub.u32 %r5, 40, %lane; shfl.sync.idx.b32 %r1, %r0, %r5, 31, -1;")
    lanes = np.arange(64) % 32
    np.testing.assert_array_equal(out, VALUES[np.arange(64) - lanes + (40 - lanes) % 32])


def test_shfl_from_a_thread_that_does_not_take_part():
    with pytest.raises(SimError, match="does not take part"):
        run("setp.ge.u32 %q0, %tid, 16; @%q0 ret;shfl.sync.down.b32 %r1, %tid, 1, 31, 0xFFFF;")


def test_vote():
    odd = VALUES.reshape(2, 32) % 2 == 1
    code = "and.b32 %r5, %r0, 1; setp.eq.u32 %q0, %r5, 1;"
    ballot = exchanged(code + "vote.sync.ballot.b32 %r1, %q0, -1;")
    expected = [sum(1 << i for i in range(32) if row[i]) for row in odd]
    np.testing.assert_array_equal(ballot.reshape(2, 32)[:, 0], np.array(expected, np.uint32))
    for mode, values in (("any", odd.any(1)), ("all", odd.all(1)), ("uni", [False, False])):
        out = exchanged(code + f"vote.sync.{mode}.pred %q1, %q0, -1; selp.b32 %r1, 1, 0, %q1;")
        np.testing.assert_array_equal(out.reshape(2, 32)[:, 0], values)
    everyone = "setp.ge.u32 %q0, %r0, 0; vote.sync.{}.pred %q1, %q0, -1; selp.b32 %r1, 1, 0, %q1;"
    for mode in ("all", "uni"):
        assert exchanged(everyone.format(mode)).all()


def test_vote_of_some_threads():
    half = "mov.b32 %r1, 7; setp.ge.u32 %q0, %lane, 16; @%q0 bra END; setp.lt.u32 %q2, %lane, {};"
    for mode, limit, expected in (("all", 16, 1), ("all", 15, 0), ("any", 0, 0), ("any", 1, 1)):
        out = exchanged(
            half.format(limit)
            + f"vote.sync.{mode}.pred %q1, %q2, 0xFFFF; selp.b32 %r1, 1, 0, %q1; END:"
        ).reshape(2, 32)
        assert (out[:, :16] == expected).all()
        assert (out[:, 16:] == 7).all()


def test_match():
    small = VALUES.reshape(2, 32) % 5
    out = exchanged("rem.u32 %r5, %r0, 5; match.any.sync.b32 %r1, %r5, -1;")
    expected = [
        [sum(1 << j for j in range(32) if row[j] == row[i]) for i in range(32)] for row in small
    ]
    np.testing.assert_array_equal(out.reshape(2, 32), np.array(expected, np.uint32))
    out = exchanged("match.all.sync.b32 %r1|%q1, %r0, -1;")
    assert not out.any()
    out = exchanged("shr.u32 %r5, %tid, 5; match.all.sync.b32 %r1|%q1, %r5, -1; @!%q1 trap;")
    assert (out == 0xFFFFFFFF).all()


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("add.u32", np.add),
        ("min.u32", np.minimum),
        ("max.u32", np.maximum),
        ("and.b32", np.bitwise_and),
        ("or.b32", np.bitwise_or),
        ("xor.b32", np.bitwise_xor),
    ],
)
def test_redux(name, function):
    operation, kind = name.split(".")
    rows = VALUES.reshape(2, 32)
    out = exchanged(f"redux.sync.{operation}.{kind} %r1, %r0, -1;")
    expected = np.repeat(function.reduce(rows, axis=1, dtype=np.uint32), 32)
    np.testing.assert_array_equal(out, expected)
    half = exchanged(
        "setp.ge.u32 %q0, %lane, 16; mov.b32 %r1, 0; @%q0 bra END;"
        f"redux.sync.{operation}.{kind} %r1, %r0, 0xFFFF; END:"
    ).reshape(2, 32)
    expected = function.reduce(rows[:, :16], axis=1, dtype=np.uint32)
    np.testing.assert_array_equal(half[:, :16], np.repeat(expected, 16).reshape(2, 16))
    assert not half[:, 16:].any()


def test_signed_redux():
    out = exchanged("sub.s32 %r5, %r0, 50; redux.sync.min.s32 %r1, %r5, -1;")
    expected = (VALUES.astype(np.int32) - 50).reshape(2, 32).min(1)
    np.testing.assert_array_equal(out.view(np.int32), np.repeat(expected, 32))


def test_elect():
    out = exchanged("elect.sync _|%q1, -1; selp.b32 %r1, 1, 0, %q1;")
    assert out.tolist() == [1, *[0] * 31] * 2
