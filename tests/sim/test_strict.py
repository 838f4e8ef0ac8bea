"""What the interpreter does not know it refuses, when the kernel is loaded."""

import numpy as np
import pytest
from ptx_kernels import run

from fusetune.sim import SimError, UnknownInstruction

# A valid form of every instruction; a modifier that no instruction has is put into each.
VALID = [
    "abs.s32 %r0, %tid;",
    "activemask.b32 %r0;",
    "add.u32 %r0, %tid, 1;",
    "add.f32 %f0, 0f00000000, 0f00000000;",
    "addc.u32 %r0, %tid, 1;",
    "and.b32 %r0, %tid, 1;",
    "atom.global.add.u32 %r0, [%p0], 1;",
    "bar.sync 0;",
    "bfe.u32 %r0, %tid, 1, 2;",
    "bfi.b32 %r0, %tid, %tid, 1, 2;",
    "bfind.u32 %r0, %tid;",
    "bra LABEL; LABEL:",
    "brev.b32 %r0, %tid;",
    "clz.b32 %r0, %tid;",
    "cnot.b32 %r0, %tid;",
    "copysign.f32 %f0, 0f00000000, 0f00000000;",
    "cos.approx.f32 %f0, 0f00000000;",
    "cp.async.cg.shared.global [%r0], [%d0], 16;",
    "cp.async.commit_group;",
    "cp.async.wait_group 0;",
    "createpolicy.fractional.L2::evict_first.b64 %d0, 0f3F800000;",
    "cvt.u64.u32 %d0, %tid;",
    "cvt.rn.f32.u32 %f0, %tid;",
    "cvta.to.global.u64 %d0, %p0;",
    "div.u32 %r0, %tid, 1;",
    "elect.sync _|%q0, -1;",
    "ex2.approx.f32 %f0, 0f00000000;",
    "fence.sc.gpu;",
    "fma.rn.f32 %f0, 0f00000000, 0f00000000, 0f00000000;",
    "isspacep.shared %q0, %p0;",
    "ld.global.b32 %r0, [%p0];",
    "ld.param.u64 %d0, [param0];",
    "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [%r1];",
    "lg2.approx.f32 %f0, 0f3F800000;",
    "lop3.b32 %r0, %tid, %tid, %tid, 1;",
    "mad.lo.u32 %r0, %tid, 1, 1;",
    "madc.hi.u32 %r0, %tid, 1, 1;",
    "match.any.sync.b32 %r0, %tid, -1;",
    "max.u32 %r0, %tid, 1;",
    "membar.gl;",
    "min.f32 %f0, 0f00000000, 0f00000000;",
    "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f0, %f1, %f2, %f3}, {%r0, %r1}, {%r2},"
    " {%f0, %f1, %f2, %f3};",
    "mov.b32 %r0, %tid;",
    "mul.hi.u32 %r0, %tid, 1;",
    "neg.s32 %r0, %tid;",
    "not.b32 %r0, %tid;",
    "popc.b32 %r0, %tid;",
    "prmt.b32 %r0, %tid, %tid, 1;",
    "rcp.approx.f32 %f0, 0f3F800000;",
    "red.global.add.u32 [%p0], 1;",
    "redux.sync.add.u32 %r0, %tid, -1;",
    "rem.u32 %r0, %tid, 1;",
    "rsqrt.approx.f32 %f0, 0f3F800000;",
    "sad.u32 %r0, %tid, 1, 1;",
    "selp.b32 %r0, 1, 0, %q0;",
    "setp.eq.u32 %q0, %tid, 1;",
    "shf.l.wrap.b32 %r0, %tid, 1, 1;",
    "shfl.sync.idx.b32 %r0, %tid, 1, 31, -1;",
    "shl.b32 %r0, %tid, 1;",
    "shr.u32 %r0, %tid, 1;",
    "sin.approx.f32 %f0, 0f00000000;",
    "sqrt.rn.f32 %f0, 0f00000000;",
    "st.global.b32 [%p0], %tid;",
    "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r1], {%r0};",
    "sub.u32 %r0, %tid, 1;",
    "subc.u32 %r0, %tid, 1;",
    "tanh.approx.f32 %f0, 0f00000000;",
    "testp.finite.f32 %q0, 0f00000000;",
    "vote.sync.any.pred %q0, %q0, -1;",
    "xor.b32 %r0, %tid, 1;",
]


def load(code):
    """Loads a kernel, without executing the code."""
    run(f"bra END_OF_TEST; {code} END_OF_TEST:", np.zeros(8, np.uint32))


@pytest.mark.parametrize("code", VALID)
def test_unknown_modifiers_raise(code):
    load(code)
    mnemonic = code.split()[0].split(".")[0].rstrip(";")
    with pytest.raises(UnknownInstruction):
        load(code.replace(mnemonic, f"{mnemonic}.novelty", 1))


def test_every_instruction_is_tested_for_it():
    from fusetune.sim.ptx.instructions.registry import _MAKERS

    tested = {code.split()[0].split(".")[0].rstrip(";") for code in VALID}
    same_maker = {_MAKERS[name] for name in tested}
    without = {"ret", "exit", "trap", "nanosleep", "griddepcontrol", "prefetch", "prefetchu"}
    assert {name for name, maker in _MAKERS.items() if maker not in same_maker} == without


@pytest.mark.parametrize(
    "code",
    [
        "wgmma.fence.sync.aligned;",
        "mbarrier.init.shared.b64 [%r0], 1;",
        "cp.async.bulk.commit_group;",
        "cp.async.mbarrier.arrive.noinc.shared.b64 [%r0];",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%p0], [%r0], 16;",
        "call.uni printf, (%r0);",
        "add.rz.f32 %f0, 0f00000000, 0f00000000;",
        "add.ftz.f16 %h0, %h1, %h2;",
        "setp.eq.ftz.f16 %q0, %h1, %h2;",
        "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 {%r0, %r1, %r2, %r3},"
        " {%r0, %r1, %r2, %r3}, {%r0, %r1}, {%r0, %r1, %r2, %r3};",
        "fence.proxy.async;",
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r0], %r1, [%r2];",
        "ret.novelty;",
        "trap.novelty;",
        "prefetch.global.novelty [%p0];",
        "add.sat.s32 %r0, %tid, 1;",
        "cvt.rs.f16x2.f32 %r0, 0f00000000, 0f00000000, %r1;",
        "cvt.rn.bf16.u32 %h0, %tid;",
        "cvt.rz.f16.f32 %h0, 0f00000000;",
        "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%r0, %r1, %r2, %r3},"
        " {%r0, %r1, %r2, %r3}, {%r0, %r1}, {%r0, %r1, %r2, %r3};",
        "mma.sync.aligned.m16n8k16.col.row.f32.f16.f16.f32 {%f0, %f1, %f2, %f3},"
        " {%r0, %r1, %r2, %r3}, {%r0, %r1}, {%f0, %f1, %f2, %f3};",
        "bar.red.popc.u32 %r0, 0, %q0;",
        "bar.arrive 0, 64;",
        "vote.any.pred %q0, %q0;",
        "shfl.down.b32 %r0, %tid, 1, 31;",
        "min.xorsign.abs.f32 %f0, 0f00000000, 0f00000000;",
        "atom.global.add.noftz.v2.f16x2 %r0, [%p0], %r1;",
        "ld.global.v2.b32 %r0, [%p0];",
        "ld.const.v3.b32 {%r0, %r1, %r2}, [%p0];",
        "mov.u32 %r0, %smid;",
        "mov.u32 %r0, nowhere;",
        "ld.global.b32 %r0, [nowhere];",
        "ld.shared.b32 %r0, [%tid*4];",
        "setp.lo.s32 %q0, %tid, 1;",
        "setp.ltu.s32 %q0, %tid, 1;",
        "add.u32 %r0, %tid;",
        "add.u64 %r0, %d0, 1;",
        "bra NOWHERE;",
        "ld.param.u64 %d0, [param0+8];",
        "lop3.b32 %r0, %tid, %tid, %tid, %tid;",
    ],
)
def test_what_is_not_modelled_raises(code):
    with pytest.raises(UnknownInstruction, match="`"):
        load(code)


def test_text_that_is_no_ptx():
    with pytest.raises(SimError, match="cannot read"):
        load("<<<>>>;")
    with pytest.raises(SimError, match="not closed"):
        load("{ add.u32 %r0, %tid, 1;")
