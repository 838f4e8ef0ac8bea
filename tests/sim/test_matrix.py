"""Tensor-core instructions against loops over elements, in the layouts of the PTX manual."""

import numpy as np
import pytest
import torch
from ptx_kernels import run

from fusetune.sim import OutOfBounds, Race, Uninitialised

TORCH = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "s8": torch.int8,
    "u8": torch.uint8,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
SIZE = {"f16": 2, "bf16": 2, "tf32": 4, "s8": 1, "u8": 1, "e4m3": 1, "e5m2": 1}
SHAPES = [  # type of A and B, k, type of C
    ("f16", 8, "f32"),
    ("f16", 8, "f16"),
    ("f16", 16, "f32"),
    ("f16", 16, "f16"),
    ("bf16", 8, "f32"),
    ("bf16", 16, "f32"),
    ("tf32", 4, "f32"),
    ("tf32", 8, "f32"),
    ("s8", 16, "s32"),
    ("s8", 32, "s32"),
    ("u8", 32, "s32"),
    ("e4m3", 32, "f32"),
    ("e5m2", 32, "f32"),
]


def matrices(kind, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind in ("s8", "u8"):
        low, high = (-128, 128) if kind == "s8" else (0, 256)
        sides = [
            torch.randint(low, high, shape, generator=generator) for shape in ((16, k), (k, 8))
        ]
    else:
        sides = [torch.randn(shape, generator=generator) for shape in ((16, k), (k, 8))]
    if kind == "tf32":  # the lower 13 bits of the mantissa are no part of it
        sides = [(side.view(torch.int32) & ~0x1FFF).view(torch.float32) for side in sides]
    return [side.to(TORCH[kind]) for side in sides]


def element_of_a(lane, i, per_register):
    """(row, column) of element i of a thread's fragment of A."""
    register, within = divmod(i, per_register)
    row = lane // 4 + 8 * (register % 2)
    return row, register // 2 * 4 * per_register + lane % 4 * per_register + within


def element_of_b(lane, i, per_register):
    register, within = divmod(i, per_register)
    return register * 4 * per_register + lane % 4 * per_register + within, lane // 4


def element_of_c(lane, i):
    return lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2


def fragments(matrix, place, count, per_register):
    """[32, registers] words of every thread."""
    bits = matrix.view(torch.uint8) if matrix.element_size() == 1 else matrix
    rows = [
        torch.stack([bits[place(lane, i, per_register)] for i in range(count)])
        for lane in range(32)
    ]
    return torch.stack(rows).contiguous().view(torch.int32)


def exact(side):
    return side.to(torch.float64)


@pytest.mark.parametrize(("kind", "k", "c_kind"), SHAPES)
def test_mma(kind, k, c_kind):
    a, b = matrices(kind, k)
    c = torch.randn(16, 8).to(
        {"f32": torch.float32, "f16": torch.float16, "s32": torch.int32}[c_kind]
    )
    per = 4 // SIZE[kind]
    words = k // per // 4
    a_words = fragments(a, element_of_a, 2 * words * per, per)
    b_words = fragments(b, element_of_b, words * per, per)
    c_parts = torch.stack(
        [torch.stack([c[element_of_c(lane, i)] for i in range(4)]) for lane in range(32)]
    )
    count = 2 if c_kind == "f16" else 4
    out = torch.zeros_like(c_parts)

    def load(register, n, parameter):
        bytes_each = 4 * n
        return f"mad.wide.u32 %d0, %tid, {bytes_each}, %p{parameter};" + "".join(
            f"ld.global.b32 {register}{i}, [%d0+{4 * i}];" for i in range(n)
        )

    registers = {
        name: "{" + ", ".join(f"%{name}{i}" for i in range(n)) + "}"
        for name, n in (("a", 2 * words), ("b", words), ("c", count))
    }
    counts = run(
        f"""
        .reg .b32 %a<8>, %b<4>, %c<4>;
        {load("%a", 2 * words, 0)} {load("%b", words, 1)} {load("%c", count, 2)}
        mma.sync.aligned.m16n8k{k}.row.col.{c_kind}.{kind}.{kind}.{c_kind}
            {registers["c"]}, {registers["a"]}, {registers["b"]}, {registers["c"]};
        mad.wide.u32 %d0, %tid, {4 * count}, %p3;
        {"".join(f"st.global.b32 [%d0+{4 * i}], %c{i};" for i in range(count))}
        """,
        a_words,
        b_words,
        c_parts,
        out,
    )
    expected = exact(a) @ exact(b) + exact(c)
    got = torch.zeros(16, 8, dtype=torch.float64)
    for lane in range(32):
        for i in range(4):
            got[element_of_c(lane, i)] = out[lane, i].to(torch.float64)
    # k products summed in fp32, then one rounding to C's type.
    magnitude = exact(a).abs() @ exact(b).abs() + exact(c).abs()
    eps = {"f32": 0.0, "f16": torch.finfo(torch.float16).eps, "s32": 0.0}[c_kind]
    allowed = (0 if c_kind == "s32" else (k + 1) * 2**-24) * magnitude + eps / 2 * expected.abs()
    assert ((got - expected).abs() <= allowed).all()
    assert counts.mma_flops == 2 * 16 * 8 * k


def test_mma_ignores_the_lower_bits_of_tf32():
    one = np.full((32, 2), np.float32(1.0).view(np.uint32) | 0x1FFF, np.uint32)
    out = np.zeros((32, 4), np.float32)
    run(
        """
        mad.wide.u32 %d0, %tid, 8, %p0; ld.global.v2.b32 {%r0, %r1}, [%d0];
        mov.f32 %f0, 0f00000000;
        mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%f1, %f2, %f3, %f4}, {%r0, %r1}, {%r0},
            {%f0, %f0, %f0, %f0};
        mad.wide.u32 %d1, %tid, 16, %p1; st.global.v4.f32 [%d1], {%f1, %f2, %f3, %f4};
        """,
        one,
        out,
    )
    assert (out == 4.0).all()


def tile(count):
    return np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8) * 3 + 1


FILL = """
    .shared .align 16 .b8 s[1024]; mov.u32 %r0, s; mad.lo.u32 %r1, %tid, 16, %r0;
    mad.wide.u32 %d0, %tid, 16, %p0; ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%d0];
"""


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, trans):
    matrices_in, out = tile(4), np.zeros((32, count, 2), np.uint16)
    registers = ", ".join(f"%r{10 + i}" for i in range(count))
    counts = run(
        FILL
        + f"""
        st.shared.v4.b32 [%r1], {{%r2, %r3, %r4, %r5}}; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r1];
        mad.wide.u32 %d1, %tid, {4 * count}, %p1;
        {"".join(f"st.global.b32 [%d1+{4 * i}], %r{10 + i};" for i in range(count))}
        """,
        matrices_in,
        out,
    )
    for lane in range(32):
        for i in range(count):
            row, column = lane // 4, 2 * (lane % 4)
            matrix = matrices_in[i].T if trans else matrices_in[i]
            assert out[lane, i].tolist() == matrix[row, column : column + 2].tolist()
    assert counts.shared_load_wavefronts == count


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix_is_the_converse(count, trans):
    matrices_in, out = tile(4), np.zeros((count, 8, 8), np.uint16)
    registers = ", ".join(f"%r{10 + i}" for i in range(count))
    run(
        FILL
        + f"""
        st.shared.v4.b32 [%r1], {{%r2, %r3, %r4, %r5}}; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x{count}.shared.b16 {{{registers}}}, [%r1]; bar.warp.sync -1;
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r1+512], {{{registers}}};
        bar.warp.sync -1; setp.ge.u32 %q0, %tid, {8 * count}; @%q0 ret;
        ld.shared.v4.b32 {{%r2, %r3, %r4, %r5}}, [%r1+512];
        mad.wide.u32 %d1, %tid, 16, %p1; st.global.v4.b32 [%d1], {{%r2, %r3, %r4, %r5}};
        """,
        matrices_in,
        out,
    )
    expected = matrices_in[:count].swapaxes(1, 2) if trans else matrices_in[:count]
    np.testing.assert_array_equal(out, expected)


LOAD_X4 = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, "


def test_ldmatrix_checks_its_rows():
    store = "st.shared.v4.b32 [%r1], {%r2, %r3, %r4, %r5}; bar.warp.sync -1;"
    with pytest.raises(OutOfBounds, match="misaligned shared ldmatrix"):
        run(FILL + store + LOAD_X4 + "[%r1+8];", tile(4))
    with pytest.raises(OutOfBounds, match="out of bounds shared ldmatrix"):
        run(FILL + store + LOAD_X4 + "[%r1+528];", tile(4))
    with pytest.raises(Uninitialised):
        run(FILL + store + LOAD_X4 + "[%r1+16];", tile(4))


def test_ldmatrix_of_what_another_warp_wrote():
    body = (
        FILL
        + "st.shared.v4.b32 [%r1], {%r2, %r3, %r4, %r5}; BARRIER xor.b32 %r1, %r1, 512;"
        + LOAD_X4
        + "[%r1];"
    )
    run(body.replace("BARRIER", "bar.sync 0;"), tile(8), threads=64)
    with pytest.raises(Race):
        run(body.replace("BARRIER", "bar.warp.sync -1;"), tile(8), threads=64)
