"""Loads and stores: what they move, and which are refused."""

import numpy as np
import pytest
import torch
from ptx_kernels import run

from fusetune.sim import OutOfBounds, Race, SimError, Uninitialised
from fusetune.sim.ptx import Program

HEADER = ".version 8.7\n.target sm_80\n.address_size 64\n"


def test_global_loads_and_stores_of_all_sizes():
    for bits, dtype in ((8, "u1"), (16, "u2"), (32, "u4"), (64, "u8")):
        source = np.arange(32).astype(dtype) * 3
        target = np.zeros(32, dtype)
        run(
            f"""
            mul.wide.u32 %d0, %tid, {bits // 8};
            add.s64 %d1, %p0, %d0; add.s64 %d2, %p1, %d0;
            .reg .b64 %wide; ld.global.u{bits} %wide, [%d1]; st.global.u{bits} [%d2], %wide;
            """,
            source,
            target,
        )
        np.testing.assert_array_equal(target, source)


def test_signed_loads_extend_their_sign():
    source, target = np.int8([-3] * 32), np.zeros(32, np.int32)
    run(
        "ld.global.s8 %r0, [%p0]; add.s64 %d0, %p1, %off; st.global.b32 [%d0], %r0;", source, target
    )
    assert (target == -3).all()


@pytest.mark.parametrize("count", [2, 4])
def test_vectors(count):
    source, target = np.arange(32 * count, dtype=np.float32), np.zeros(32 * count, np.float32)
    registers = ", ".join(f"%f{i}" for i in range(count))
    swapped = ", ".join(f"%f{i}" for i in reversed(range(count)))
    run(
        f"""
        mul.wide.u32 %d0, %tid, {4 * count}; add.s64 %d1, %p0, %d0; add.s64 %d2, %p1, %d0;
        ld.global.v{count}.f32 {{{registers}}}, [%d1]; st.global.v{count}.f32 [%d2], {{{swapped}}};
        """,
        source,
        target,
    )
    np.testing.assert_array_equal(target.reshape(32, count), source.reshape(32, count)[:, ::-1])


def test_offsets_of_addresses():
    source, target = np.arange(8, dtype=np.uint32), np.zeros(2, np.uint32)
    run(
        "add.s64 %d0, %p0, 16; ld.global.b32 %r0, [%d0+8]; ld.global.b32 %r1, [%d0+-4];"
        "st.global.v2.b32 [%p1], {%r0, %r1};",
        source,
        target,
    )
    assert target.tolist() == [6, 3]


def test_constants_of_the_module():
    target = np.zeros(32, np.float32)
    run(
        """
        setp.lt.u32 %q0, %tid, 2; @!%q0 ret;
        mov.u64 %d0, table; add.s64 %d0, %d0, %off; ld.const.f32 %f0, [%d0];
        add.s64 %d1, %p0, %off; st.global.f32 [%d1], %f0;
        """,
        target,
        outside=".const .align 4 .f32 table[2] = {0f3F800000, 0f40000000};\n",
    )
    assert target[:3].tolist() == [1.0, 2.0, 0.0]


def test_parameters_of_all_kinds():
    text = (
        HEADER
        + """.entry kernel(.param .u64 .ptr .global .align 4 out, .param .f32 f, .param .u16 h,
    .param .align 8 .b8 pair[16]) {
    .reg .b64 %p, %d; .reg .b32 %r<3>; .reg .f32 %f; .reg .b16 %h;
    ld.param.u64 %p, [out]; ld.param.f32 %f, [f]; ld.param.u16 %h, [h];
    ld.param.u64 %d, [pair+8];
    cvt.u32.u16 %r0, %h; cvt.u32.u64 %r1, %d;
    st.global.f32 [%p], %f; st.global.b32 [%p+4], %r0; st.global.b32 [%p+8], %r1; ret; }"""
    )
    out = np.zeros(3, np.uint32)
    pair = np.array([7, 9], np.uint64).tobytes()
    program = Program(text)
    assert program.parameters("kernel") == [8, 4, 2, 16]
    program.launch("kernel", (1, 1, 1), (1, 1, 1), [out, 1.5, 6, pair])
    assert out.tolist() == [np.float32(1.5).view(np.uint32), 6, 9]


def test_generic_addresses_reach_shared_and_local_memory():
    target = np.zeros(64, np.uint32)
    run(
        """
        .shared .align 4 .b32 s[32]; .local .align 4 .b32 l[2];
        mov.u64 %d0, s; cvta.shared.u64 %d0, %d0; add.s64 %d0, %d0, %off;
        mov.u64 %d1, l; cvta.local.u64 %d1, %d1;
        st.b32 [%d0], %tid; mul.lo.u32 %r0, %tid, 2; st.b32 [%d1+4], %r0;
        ld.b32 %r1, [%d0]; ld.b32 %r2, [%d1+4];
        isspacep.shared %q0, %d0; isspacep.shared %q1, %d1; @!%q0 trap; @%q1 trap;
        cvta.to.shared.u64 %d2, %d0; ld.shared.b32 %r3, [%d2]; setp.ne.u32 %q2, %r3, %r1; @%q2 trap;
        add.s64 %d3, %p0, %off; st.b32 [%d3], %r1; st.b32 [%d3+128], %r2;
        """,
        target,
    )
    np.testing.assert_array_equal(target[:32], np.arange(32))
    np.testing.assert_array_equal(target[32:], 2 * np.arange(32))


def test_ctas_have_shared_memory_of_their_own():
    target = np.zeros(4 * 32, np.uint32)
    run(
        """
        .shared .align 4 .b32 s[32];
        mov.u32 %r0, %ctaid.x; mad.lo.u32 %r1, %r0, 32, %tid;
        cvt.u32.u64 %r2, %off; mov.u32 %r3, s; add.u32 %r2, %r2, %r3;
        st.shared.b32 [%r2], %r1; bar.sync 0; xor.b32 %r2, %r2, 4; ld.shared.b32 %r4, [%r2];
        mul.wide.u32 %d0, %r1, 4; add.s64 %d0, %d0, %p0; st.global.b32 [%d0], %r4;
        """,
        target,
        ctas=4,
    )
    np.testing.assert_array_equal(target, np.arange(128) ^ 1)


LOAD = "add.s64 %d0, %p0, %off; ld.global.b32 %r0, [%d0];"


def test_reading_past_the_end():
    with pytest.raises(OutOfBounds, match=r"byte 124 of a tensor of 124 bytes.*thread 31 of CTA"):
        run(LOAD, np.zeros(31, np.float32))


def test_reading_before_the_start():
    data = np.zeros(64, np.float32)
    with pytest.raises(OutOfBounds, match="thread 0 "):
        run("add.s64 %d0, %p0, -4; ld.global.b32 %r0, [%d0];", data[16:48])


def test_storing_past_the_end():
    data = np.zeros(33, np.float32)
    with pytest.raises(OutOfBounds, match="global store"):
        run("add.s64 %d0, %p0, %off; st.global.b32 [%d0+8], %tid;", data[:32])
    assert not data.any()  # nothing was written, not even by threads in bounds


def test_misaligned_access():
    data = np.zeros(64, np.float32)
    with pytest.raises(OutOfBounds, match="misaligned global load of 8 bytes"):
        run("add.s64 %d0, %p0, %off; ld.global.b64 %d1, [%d0];", data)


def test_the_predicate_protects():
    data, out = np.arange(20, dtype=np.uint32), np.full(32, 77, np.uint32)
    run(
        "setp.lt.u32 %q0, %tid, 20; mov.b32 %r0, 5; add.s64 %d0, %p0, %off;"
        "@%q0 ld.global.b32 %r0, [%d0]; add.s64 %d1, %p1, %off; st.global.b32 [%d1], %r0;",
        data,
        out,
    )
    assert out.tolist() == [*range(20), *[5] * 12]


def test_gaps_between_rows_are_out_of_bounds():
    whole = torch.zeros(8, 6)
    run(
        "rem.u32 %r1, %tid, 4; div.u32 %r2, %tid, 4; mad.lo.u32 %r3, %r2, 6, %r1;"
        "mul.wide.u32 %d0, %r3, 4; add.s64 %d0, %d0, %p0; ld.global.b32 %r0, [%d0];",
        whole[:, :4],
    )
    with pytest.raises(OutOfBounds, match="thread 4 "):
        run(LOAD, whole[:, :4])
    with pytest.raises(OutOfBounds, match="thread 1 "):
        run(LOAD, whole.t()[:1])  # one column: its elements are 6 apart


def test_strides_beyond_32_bits_need_no_memory():
    row = torch.zeros(64)
    rows = row.as_strided((2, 16), (48, 1))
    data = np.zeros(32, np.uint32)
    run("setp.lt.u32 %q0, %tid, 16; @!%q0 ret;" + LOAD, rows, data)
    with pytest.raises(OutOfBounds):
        run(LOAD, rows, data)


def test_a_broadcast_dimension_is_one_element():
    one = torch.zeros(1, 4).expand(8, 4)
    run("and.b32 %r1, %tid, 3; mul.wide.u32 %d0, %r1, 4; add.s64 %d0, %d0, %p0;"
        "ld.global.b32 %r0, [%d0];", one)  # fmt: skip
    with pytest.raises(OutOfBounds):
        run(LOAD, one)


def test_tensors_that_were_not_passed():
    secret, out = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    text = f"mov.u64 %d0, {secret.ctypes.data}; ld.global.b32 %r0, [%d0];"
    with pytest.raises(OutOfBounds):
        run(text, out)
    run(text, out, secret)


def test_null():
    with pytest.raises(OutOfBounds, match="below all memory"):
        run("mov.u64 %d0, 0; ld.global.b32 %r0, [%d0];", np.zeros(4))


def test_shared_memory_out_of_bounds():
    body = ".shared .align 4 .b8 s[128]; mov.u32 %r0, s; st.shared.b32 [%r0+{}], %tid;"
    run("setp.ne.u32 %q0, %tid, 0; @%q0 ret;" + body.format(124))
    with pytest.raises(OutOfBounds, match="shared store of 4 bytes at 128 of 128"):
        run("setp.ne.u32 %q0, %tid, 0; @%q0 ret;" + body.format(128))
    with pytest.raises(OutOfBounds, match="misaligned"):
        run("setp.ne.u32 %q0, %tid, 0; @%q0 ret;" + body.format(2))


def test_local_memory_out_of_bounds():
    body = ".local .align 4 .b8 l[16]; mov.u64 %d0, l; st.local.b32 [%d0+{}], %tid;"
    run(body.format(12))
    with pytest.raises(OutOfBounds, match="local store"):
        run(body.format(16))


def test_shared_memory_that_was_never_written():
    body = """
    .shared .align 16 .b8 s[256]; mov.u32 %r0, s; cvt.u32.u64 %r1, %off; add.u32 %r0, %r0, %r1;
    setp.ne.u32 %q0, %tid, 7; {guard} st.shared.b32 [%r0], %tid; ld.shared.b32 %r2, [%r0];
    """
    run(body.format(guard=""))
    with pytest.raises(Uninitialised, match=r"shared memory that was never written.*thread 7 "):
        run(body.format(guard="@%q0"))
    run(body.format(guard="@%q0"), check=False)


def test_half_written_words_of_shared_memory():
    body = """
    .shared .align 16 .b8 s[16]; mov.u32 %r0, s; setp.ne.u32 %q0, %tid, 0; @%q0 ret;
    mov.b16 %h0, 1; st.shared.b16 [%r0], %h0; ld.shared.{kind} %r2, [%r0];
    """
    run(body.format(kind="u16"))
    with pytest.raises(Uninitialised):
        run(body.format(kind="b32"))


def test_registers_that_were_never_written():
    with pytest.raises(Uninitialised, match="%r5 was never written"):
        run("add.u32 %r0, %r5, 1;")
    with pytest.raises(Uninitialised, match="thread 3 "):
        run("setp.ne.u32 %q0, %tid, 3; @%q0 mov.b32 %r5, 1; add.u32 %r0, %r5, 1;")
    run("setp.ne.u32 %q0, %tid, 3; @%q0 mov.b32 %r5, 1; @!%q0 mov.b32 %r5, 2; add.u32 %r0, %r5, 1;")


def test_a_register_that_is_written_in_the_end():
    run("setp.ne.u32 %q0, %tid, 3; @%q0 mov.b32 %r5, 1; mov.b32 %r5, 2; add.u32 %r0, %r5, 1;")


def test_moving_an_unwritten_register_is_no_use_of_it():
    run(
        "setp.ne.u32 %q0, %tid, 3; @%q0 mov.b32 %r5, 1; mov.b32 %r6, %r5; @%q0 add.u32 %r0, %r6, 1;"
    )
    with pytest.raises(Uninitialised, match="%r6"):
        run("setp.ne.u32 %q0, %tid, 3; @%q0 mov.b32 %r5, 1; mov.b32 %r6, %r5; add.u32 %r0, %r6, 1;")
    with pytest.raises(Uninitialised, match="%r6"):
        run("mov.b32 %r6, %r5; add.u32 %r0, %r6, 1;")


def test_registers_that_the_compiler_leaves_open():
    out = np.zeros(32, np.uint32)
    run("// implicit-def: %r5\nadd.s64 %d0, %p0, %off; st.global.b32 [%d0], %r5;", out)
    assert (out == 0xFFFFFFFF).all()


def test_wrong_launches():
    program = Program(HEADER + ".entry k(.param .u32 a) { ret; }")
    with pytest.raises(SimError, match="no kernel 'other'; there are k"):
        program.launch("other", (1, 1, 1), (32, 1, 1), [])
    with pytest.raises(SimError, match="2 arguments for 1"):
        program.launch("k", (1, 1, 1), (32, 1, 1), [1, 2])
    with pytest.raises(SimError, match="grid"):
        program.launch("k", (0, 1, 1), (32, 1, 1), [1])
    with pytest.raises(SimError, match="block"):
        program.launch("k", (1, 1, 1), (1025, 1, 1), [1])
    with pytest.raises(SimError, match="8 bytes"):
        program.launch("k", (1, 1, 1), (32, 1, 1), [b"12345678"])


def test_threads_that_disagree_about_a_place():
    out = np.zeros(32, np.uint32)
    body = "and.b32 %r1, %tid, {}; shr.u32 %r2, %tid, 1; mad.wide.u32 %d0, %r1, 4, %p0;"
    run(body.format(31) + "st.global.b32 [%d0], %tid;", out)
    run(body.format(30) + "st.global.b32 [%d0], %r2;", out)  # pairs store the same
    with pytest.raises(Race, match="different values to one place"):
        run(body.format(30) + "st.global.b32 [%d0], %tid;", out)
    shared = ".shared .align 4 .b32 s[32]; mov.u32 %r3, s; mad.lo.u32 %r3, %r1, 4, %r3;"
    run(body.format(30) + shared + "st.shared.b32 [%r3], %r2;", out)
    with pytest.raises(Race, match="different values to one place"):
        run(body.format(30) + shared + "st.shared.b32 [%r3], %tid;", out)


ATOMICS = {
    "add.u32": (lambda old, v: old + v, "u4"),
    "add.f32": (lambda old, v: old + v, "f4"),
    "add.f64": (lambda old, v: old + v, "f8"),
    "min.s32": (min, "i4"),
    "max.u64": (max, "u8"),
    "and.b32": (lambda old, v: old & v, "u4"),
    "or.b64": (lambda old, v: old | v, "u8"),
    "xor.b32": (lambda old, v: old ^ v, "u4"),
    "exch.b32": (lambda old, v: v, "u4"),
    "inc.u32": (lambda old, v: 0 if old >= v else old + 1, "u4"),
    "dec.u32": (lambda old, v: v if old == 0 or old > v else old - 1, "u4"),
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("name", ATOMICS)
def test_atomics_go_one_after_the_other(name, space):
    function, dtype = ATOMICS[name]
    size = np.dtype(dtype).itemsize
    rng = np.random.default_rng(0)
    values = rng.integers(1, 40, 32).astype(dtype)
    cell, old, final = np.array([5], dtype), np.zeros(32, dtype), np.zeros(1, dtype)
    where = "[%p1]" if space == "global" else "[s]"
    run(
        f"""
        .shared .align 8 .b8 s[8]; .reg .b{8 * size} %v, %o, %z;
        mul.wide.u32 %d0, %tid, {size}; add.s64 %d1, %p0, %d0; add.s64 %d2, %p2, %d0;
        ld.global.b{8 * size} %z, [%p1]; setp.eq.u32 %q0, %tid, 0;
        @%q0 st.shared.b{8 * size} [s], %z;
        ld.global.b{8 * size} %v, [%d1]; atom.{space}.{name} %o, {where}, %v;
        st.global.b{8 * size} [%d2], %o; ld.{space}.b{8 * size} %z, {where};
        st.global.b{8 * size} [%p3], %z;
        """,
        values,
        cell,
        old,
        final,
    )
    current = np.array(5, dtype)[()]
    for value, before in zip(values, old, strict=True):
        assert before == current
        current = function(current, value)
    assert final[0] == current


def test_compare_and_swap():
    cell, old = np.uint32([0]), np.zeros(32, np.uint32)
    run(
        "add.u32 %r1, %tid, 1; atom.global.cas.b32 %r0, [%p0], %tid, %r1; add.s64 %d0, %p1, %off;"
        "st.global.b32 [%d0], %r0;",
        cell,
        old,
    )
    assert cell[0] == 32
    assert old.tolist() == list(range(32))


@pytest.mark.parametrize(("kind", "dtype"), [("f16x2", torch.float16), ("bf16x2", torch.bfloat16)])
def test_atomic_addition_of_pairs(kind, dtype):
    cell = torch.tensor([1.0, 10.0]).to(dtype)
    values = torch.arange(64.0).reshape(32, 2).to(dtype) / 8
    noftz = ".noftz"
    run(
        f"add.s64 %d0, %p0, %off; ld.global.b32 %r0, [%d0];"
        f"red.global.add{noftz}.{kind} [%p1], %r0;",
        values,
        cell,
    )
    expected = torch.tensor([1.0, 10.0]).to(dtype)
    for row in values:
        expected += row
    assert torch.equal(cell, expected)
