"""bottleneck by Triton, simulated: shapes, groups, precision of weights, bytes, reasons."""

import pytest
import torch
from backends import TRITON, simulated
from bottleneck_cases import DTYPES, FUNCTIONS, check, make, results
from tolerance import assert_same

from fusetune import ops
from fusetune.ops import _triton
from fusetune.ops._registry import OPS, Case

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def triton_sim():
    with simulated("triton-sim") as run:
        yield run


@pytest.mark.parametrize("backend", TRITON, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", ["fp32", "own"])
@pytest.mark.parametrize("shape", [(1, 7, 3), (37, 72, 20), (66, 98, 48)], ids=str)
def test_shapes(backend, shape, weights, dtype):
    own = F32 if weights == "fp32" else dtype
    check(make(*shape, dtype, weights=own, activation="gelu", dropout_p=0.3, residual="same"))


@pytest.mark.parametrize("backend", TRITON, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [100, 256, 300])
def test_wide_bottlenecks(backend, d, dtype):
    """The widest fall back to torch."""
    for weights in {dtype, F32}:
        check(make(20, 40, d, dtype, weights=weights, activation="silu"))


@pytest.mark.parametrize(("d", "weights"), [(100, BF16), (100, F32), (140, BF16)], ids=str)
def test_wide_bottlenecks_of_many_rows(triton_sim, d, weights):
    """From 4096 rows on a program has twice as many."""
    check(make(4097, 24, d, BF16, weights=weights, dropout_p=0.3, residual="same"))
    assert triton_sim.launches[0].grid == (65, 1, 1)


@pytest.mark.parametrize("backend", TRITON, indirect=True)
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_activations(backend, activation):
    for spread in (1.0, 30.0):
        arguments = make(20, 30, 10, activation=activation)
        arguments["down_weight"] *= spread
        check(arguments)


@pytest.mark.parametrize("backend", TRITON, indirect=True)
@pytest.mark.parametrize("rows", [[7], [5, 0, 100], [0, 0]], ids=str)
def test_groups(backend, rows):
    for dtype, residual in ((F32, "same"), (BF16, "other")):
        arguments = make(sum(rows), 70, 20, dtype, (len(rows),), rows=rows, dropout_p=0.3)
        if residual == "same":
            arguments["residual"] = "same"
        check(arguments)


def test_without_biases_and_residual(triton_sim):
    nothing = {"down_bias": None, "up_bias": None, "residual": None}
    for dtype in (F32, BF16):
        check(make(30, 50, 20, dtype, **nothing))
        check(make(30, 50, 20, dtype, scaling=torch.randn(50), weights=dtype))


def test_only_what_is_needed(triton_sim):
    arguments, dy = make(20, 40, 8, residual=None), torch.randn(20, 40)
    full = results(ops.bottleneck, arguments, dy)
    for name in ("x", "up_bias"):
        some = {n: v.clone().requires_grad_() if n == name else v for n, v in arguments.items()}
        ops.bottleneck(**some).backward(dy)
        assert_same(some[name].grad, full[f"d_{name}"], name)


def test_nan_spreads_over_its_row_only(triton_sim):
    for activation in ("relu", "gelu"):
        arguments = make(9, 40, 8, activation=activation)
        arguments["x"][4, 7] = torch.nan
        y = ops.bottleneck(**arguments)
        assert y.isnan().all(1).tolist() == y.isnan().any(1).tolist() == [i == 4 for i in range(9)]


@pytest.mark.parametrize("residual", [None, "same"])
def test_launches_and_bytes(triton_sim, residual):
    """One launch forward, two backward. Executed: x once, and once more as the residual; y and z
    once; the parameters once for every 64 rows."""
    m, h, d = 256, 256, 48
    arguments = make(m, h, d, BF16, weights=BF16, residual=residual)
    results(ops.bottleneck, arguments, torch.randn(m, h).to(BF16))
    kernels = [launch.kernel for launch in triton_sim.launches]
    assert kernels == ["_bottleneck", "_backward", "_sum_shares"]
    forward = triton_sim.launches[0]
    assert forward.grid == (m // 64, 1, 1)
    x = 2 * m * h * (1 if residual is None else 2)
    parameters = m // 64 * 2 * (2 * d * h + d + h)
    executed = 32 * forward.counts.global_sectors
    assert executed == pytest.approx(x + parameters + 2 * m * h + 2 * m * d, rel=0.01)
    opcodes = {op for launch in triton_sim.launches for op in launch.counts.instructions}
    assert not [op for op in opcodes if op.startswith(("atom", "red"))]


def test_groups_take_one_launch(triton_sim):
    ops.bottleneck(**make(100, 70, 20, BF16, (3,), rows=[40, 3, 57]))
    assert [launch.kernel for launch in triton_sim.launches] == ["_bottleneck"]


def test_results_do_not_change_from_run_to_run(triton_sim):
    arguments, dy = make(300, 72, 20, BF16, dropout_p=0.2), torch.randn(300, 72).to(BF16)

    def run():
        torch.manual_seed(2)
        return results(ops.bottleneck, arguments, dy)

    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_reasons(monkeypatch):
    with simulated("triton-sim"), ops.use_backend("auto"):
        for op in ("bottleneck", "bottleneck_backward"):
            assert OPS[op].select(Case("cpu", BF16, F32)).name == "triton"
            reasons = dict(OPS[op].explain(Case("cpu", torch.float64, torch.float64)))
            assert "float64" in reasons["triton"]
            monkeypatch.setattr(_triton, "capability", lambda device=None: 75)
            reasons = dict(OPS[op].explain(Case("cpu", F16, F32)))
            assert "sm_75" in reasons["triton"]
            monkeypatch.undo()
