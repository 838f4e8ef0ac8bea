"""fusion_attend by Triton, simulated: shapes, stacks, dropout, bytes, reasons."""

import pytest
import torch
from backends import TRITON, simulated
from tolerance import assert_same

from fusetune import ops
from fusetune.ops._adapter_fusion import attend
from fusetune.ops._registry import OPS, Case
from fusetune.reference.dropout import new_seed

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def run(g, values, offset, temperature, p, dctx):
    """ctx, p and all gradients."""
    torch.manual_seed(3)
    leaves = [t.detach().clone().requires_grad_() for t in (g, *values)]
    shift = None if offset is None else offset.clone().requires_grad_()
    seed = new_seed(g.device) if p else None
    ctx, weights = attend(leaves[0], leaves[1:], shift, temperature, p, seed)
    ctx.backward(dctx)
    grads = [leaf.grad for leaf in leaves] + ([] if shift is None else [shift.grad])
    return [ctx.detach(), weights, *grads]


def check(m, h, stacks, dtype, query=None, temperature=1.0, p=0.0, shifted=False):
    """Against the reference on the same numbers in float64, rounded to the result's dtype."""
    g = (torch.randn(m, h) * 2 / h**0.5).to(query or dtype)
    values = [torch.randn(n, m, h).to(dtype) for n in stacks]
    offset = torch.randn(m) if shifted else None
    dctx = torch.randn(m, h).to(query or dtype)
    got = run(g, values, offset, temperature, p, dctx)
    wide = [t if t is None else t.double() for t in (g, offset, dctx)]
    with ops.use_backend("reference"):
        exact = run(wide[0], [v.double() for v in values], wide[1], temperature, p, wide[2])
    for i, (a, b) in enumerate(zip(got, exact, strict=True)):
        assert_same(a, b, f"result {i}")


@pytest.mark.parametrize("backend", TRITON, indirect=True)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(
    ("m", "h", "stacks"),
    [(1, 1, [1]), (5, 72, [3]), (9, 200, [2, 1]), (3, 40, [1] * 20), (2, 2100, [1, 1])],
    ids=str,
)
def test_shapes_and_stacks(backend, m, h, stacks, dtype):
    check(m, h, stacks, dtype)


@pytest.mark.parametrize("backend", TRITON, indirect=True)
def test_options(backend):
    check(5, 72, [1, 1, 1], F32, temperature=2.0, p=0.4, shifted=True)
    check(4, 64, [17], F16, p=0.3, shifted=True)
    check(3, 100, [2], BF16, query=F32)
    check(3, 16, [64], F32)


def test_every_byte_moves_once():
    m, h, n = 16, 768, 3
    with simulated("triton-sim") as sim:
        check(m, h, [n], BF16)
    forward, backward = (launch.counts for launch in sim.launches)
    row, weights = 2 * m * h, 4 * m * n
    once = (n + 2) * row + weights  # values, g, ctx, p
    assert once <= 32 * forward.global_sectors <= 1.05 * once
    once = (2 * n + 3) * row + weights + 4 * m
    assert once <= 32 * backward.global_sectors <= 1.05 * once
    opcodes = {op for launch in sim.launches for op in launch.counts.instructions}
    assert not [op for op in opcodes if op.startswith(("atom", "red"))]


def test_long_rows_are_left_to_torch():
    with simulated("triton-sim") as sim:
        check(2, 8200, [2], F32)
    assert not sim.launches


def test_reasons():
    with simulated("triton-sim"), ops.use_backend("auto"):
        for op in ("fusion_attend", "fusion_attend_backward"):
            assert OPS[op].select(Case("cpu", F32, BF16)).name == "triton"
            reasons = dict(OPS[op].explain(Case("cpu", torch.float64, torch.float64)))
            assert "float64" in reasons["triton"]
