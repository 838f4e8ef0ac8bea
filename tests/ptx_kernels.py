"""Small PTX kernels for tests of the interpreter, written around the instructions under test."""

from __future__ import annotations

import numpy as np

from fusetune.sim.ptx import Program
from fusetune.sim.ptx.types import DTYPES

HEADER = ".version 8.7\n.target sm_80\n.address_size 64\n"
_REGISTERS = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}


def module(body, params=4, registers="", outside="", name="kernel"):
    """PTX text of one kernel with `params` 64-bit parameters: %p0, %p1, ... after the prologue.

    Declared are %r<64>, %d<32> (64 bits), %f<32>, %h<32> (16 bits), %q<16> (predicates); %tid and
    %lane are thread and lane, %off is the thread times 4 as 64 bits.
    """
    listed = ", ".join(f".param .u64 param{i}" for i in range(params))
    loads = "\n".join(f"ld.param.u64 %p{i}, [param{i}];" for i in range(params))
    return f"""{HEADER}{outside}
.visible .entry {name}({listed})
{{
    .reg .b32 %r<64>; .reg .b64 %d<32>; .reg .f32 %f<32>; .reg .b16 %h<32>; .reg .pred %q<16>;
    .reg .b64 %p<{max(params, 1)}>; .reg .b32 %tid, %lane; .reg .b64 %off;
    {registers}
    {loads}
    mov.u32 %tid, %tid.x;
    mov.u32 %lane, %laneid;
    mul.wide.u32 %off, %tid, 4;
    {body}
    ret;
}}
"""


def run(body, *arrays, threads=32, ctas=1, smem=0, check=True, outside="", registers=""):
    """Runs a body whose parameters are these arrays; the counts."""
    text = module(body, len(arrays), registers, outside)
    program = Program(text)
    return program.launch("kernel", (ctas, 1, 1), (threads, 1, 1), arrays, smem, check=check)


def calculate(instruction, target, *operands):
    """Executes an instruction once per element.

    instruction: code on %out and %in0, %in1, ...; target: type of %out; operands: (type, array) of
    the inputs, all of one length. Returns the array of results. Type "pred" is passed as 0 or 1.
    """
    (n,) = {len(array) for _, array in operands}
    kinds = [target, *(kind for kind, _ in operands)]
    names = ["out", *(f"in{i}" for i in range(len(operands)))]
    declared, loads = [], []
    for name, kind in zip(names, kinds, strict=True):
        bits = 32 if kind == "pred" else 8 * DTYPES[kind].itemsize
        declared.append(f".reg .{_REGISTERS[bits // 8]} %w_{name};")
        declared.append(f".reg .{'pred' if kind == 'pred' else _REGISTERS[bits // 8]} %{name};")
        if name == "out":
            continue
        loads.append(_element(f"ld.global.b{bits}", f"%w_{name}", name, bits))
        loads.append(_from_word(name, kind, bits))
    out_bits = 32 if target == "pred" else 8 * DTYPES[target].itemsize
    store = "mov.b16 %w_out, %out;" if out_bits <= 16 else f"mov.b{out_bits} %w_out, %out;"
    if target == "pred":
        store = "selp.b32 %w_out, 1, 0, %out;"
    body = f"""
    mov.u32 %r0, %ctaid.x; mad.lo.s32 %r0, %r0, 128, %tid;
    setp.ge.s32 %q0, %r0, {n}; @%q0 ret;
    cvt.u64.u32 %d0, %r0;
    {" ".join(loads)}
    {instruction}
    {store}
    {_element(f"st.global.b{out_bits}", "%w_out", "out", out_bits)}
    """
    order = {name: i for i, name in enumerate(names)}
    for name, i in order.items():
        body = body.replace(f"@{name}@", f"%p{i}")
    words = [_words(kind, array) for kind, array in operands]
    result = np.zeros(n, np.uint32 if target == "pred" else DTYPES[target])
    text = module(body, len(names), " ".join(declared))
    Program(text).launch("kernel", (-(-n // 128), 1, 1), (128, 1, 1), [result, *words])
    return result.astype(bool) if target == "pred" else result


def _words(kind, array):
    if kind == "pred":
        return np.ascontiguousarray(array, np.uint32)
    return np.ascontiguousarray(array).view(DTYPES[kind])


def _element(code, register, name, bits):
    address = f"mad.lo.s64 %d1, %d0, {bits // 8}, @{name}@;"
    if code.startswith("ld"):
        return f"{address} {code} {register}, [%d1];"
    return f"{address} {code} [%d1], {register};"


def _from_word(name, kind, bits):
    if kind == "pred":
        return f"setp.ne.u32 %{name}, %w_{name}, 0;"
    return f"mov.b{max(bits, 16)} %{name}, %w_{name};"


def integers(kind, n=400, seed=0):
    """Edge values of an integer type, then random ones of all magnitudes."""
    dtype = DTYPES[kind]
    info = np.iinfo(dtype)
    edges = [info.min, info.min + 1, -1, 0, 1, 2, 3, 7, 31, 32, 63, info.max - 1, info.max]
    rng = np.random.default_rng(seed)
    known = np.array([v for v in edges if info.min <= v <= info.max], dtype)
    random = rng.integers(info.min, info.max, n, dtype, endpoint=True)
    random >>= rng.integers(0, 8 * dtype.itemsize, n).astype(dtype)
    mixed = np.concatenate([np.repeat(known, len(known)), random])
    return mixed if seed == 0 else np.concatenate([np.tile(known, len(known)), random])


def floats(n=400, seed=0, dtype=np.float32):
    """Special values, then random ones of many magnitudes."""
    info = np.finfo(dtype)
    special = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, -2.5, 3.5, np.inf, -np.inf, np.nan]
    special += [info.max, info.tiny, info.tiny / 4, -info.tiny / 4]
    known = np.array(special, dtype)
    rng = np.random.default_rng(seed)
    random = (rng.standard_normal(n) * np.exp2(rng.integers(-12, 12, n))).astype(dtype)
    pairs = np.repeat if seed == 0 else np.tile
    return np.concatenate([pairs(known, len(known)), random])


def assert_same(actual, expected):
    """Equal bits, but for NaNs, which need only be NaNs, wherever they come from."""
    assert actual.dtype == expected.dtype
    if actual.dtype.kind == "f":
        np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
        actual, expected = np.nan_to_num(actual, nan=0), np.nan_to_num(expected, nan=0)
        np.testing.assert_array_equal(np.signbit(actual), np.signbit(expected))
    np.testing.assert_array_equal(actual, expected)
