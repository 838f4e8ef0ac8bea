"""The Triton driver, from host code to results; and what its kernels' mistakes look like."""

import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton_samples as samples  # noqa: E402
from triton.runtime import driver  # noqa: E402

from fusetune import ops  # noqa: E402
from fusetune.ops import _triton  # noqa: E402
from fusetune.sim import OutOfBounds, Race, triton_sim  # noqa: E402
from fusetune.sim.ptx import Program  # noqa: E402
from fusetune.sim.triton_driver import simulated_driver  # noqa: E402

ARCHS = [80, 86, 89, 120]


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_elementwise(arch, dtype):
    for n in (1000, 1024):
        x, y = random(n, dtype=dtype), random(n, dtype=dtype, seed=1)
        out = torch.full_like(x, torch.nan)
        with simulated_driver(arch) as run:
            samples.add[(4,)](x, y, out, n, BLOCK=256)
        assert torch.equal(out, x + y)
        (launch,) = run.launches
        assert (launch.kernel, launch.grid, launch.block) == ("add", (4, 1, 1), (128, 1, 1))
        size = x.element_size()
        assert launch.counts.global_load_bytes == 2 * n * size
        assert launch.counts.global_store_bytes == n * size
    # Of the length that allows vectors every sector is touched once.
    assert launch.counts.global_load_sectors == 2 * n * size // 32
    assert launch.counts.global_store_sectors == n * size // 32


@pytest.mark.parametrize("warps", [1, 4])
def test_reductions(warps):
    x = random(5, 200, dtype=torch.bfloat16)
    out = torch.full_like(x, torch.nan)
    with simulated_driver(80):
        samples.normalise[(5,)](x, out, 200, BLOCK=256, num_warps=warps)
    exact = x.double() / x.double().abs().amax(1, keepdim=True)
    assert (out.double() - exact).abs().max() <= torch.finfo(torch.bfloat16).eps / 2 * 1.001


def test_exchange_between_warps():
    x = random(512)
    out = torch.full_like(x, torch.nan)
    with simulated_driver(80) as run:
        samples.exchange[(1,)](x, out, BLOCK=512, num_warps=4)
    exact = x.double().cumsum(0) + x.double().sum() - x.double().flip(0)
    magnitude = x.double().abs().sum()
    assert (out.double() - exact).abs().max() <= 512 * 2**-24 * magnitude
    assert run.launches[0].counts.barriers > 0
    assert run.launches[0].counts.shared_wavefronts > 0


def multiply(a, b, dtype, precision="ieee", arch=80, **options):
    (m, k), n = a.shape, b.shape[0]
    c = torch.full((m, n), torch.nan, dtype=dtype)
    with simulated_driver(arch) as run:
        grid = (triton.cdiv(m, 32), triton.cdiv(n, 32))
        samples.matmul[grid](a, b, c, m, n, k, BM=32, BN=32, BK=32, PRECISION=precision, **options)
    return c, run.launches[0].counts


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("dtype", "precision", "eps"),
    [
        (torch.float16, "ieee", 2**-11),
        (torch.bfloat16, "ieee", 2**-8),
        (torch.float32, "ieee", 2**-24),
        (torch.float32, "tf32", 2**-10),
    ],
)
def test_matmul(dtype, precision, eps, arch):
    a, b = random(40, 100, dtype=dtype), random(50, 100, dtype=dtype, seed=1)
    c, counts = multiply(a, b, dtype, precision, arch, num_stages=3)
    exact = a.double() @ b.double().T
    magnitude = a.double().abs() @ b.double().abs().T
    rounding = 2 * eps if precision == "tf32" else 101 * 2**-24
    assert ((c.double() - exact).abs() <= rounding * magnitude + eps * exact.abs()).all()
    if precision != "ieee" or dtype != torch.float32:
        assert counts.mma_flops == 2 * 64 * 64 * 128  # of the padded matrices


def test_autotuning_takes_the_first_configuration():
    x = random(300)
    out = torch.full_like(x, torch.nan)
    with simulated_driver(80) as run:
        samples.tuned_double[lambda meta: (triton.cdiv(300, meta["BLOCK"]),)](x, out, 300)
    assert torch.equal(out, 2 * x)
    assert [launch.grid for launch in run.launches] == [(5, 1, 1)]


def test_out_of_bounds_names_the_line():
    x, out = random(1000), torch.empty(1024)
    with simulated_driver(80), pytest.raises(OutOfBounds) as caught:
        samples.add_unmasked[(4,)](x, x, out, BLOCK=256)
    assert re.search(r"triton_samples\.py:\d+ by thread \d+ of CTA \(3, 0, 0\)", str(caught.value))
    assert "kernel add_unmasked" in str(caught.value)


def test_targets_do_not_mix():
    x = random(64)
    opcodes = {}
    for arch in (80, 120, 80):
        out = torch.full_like(x, torch.nan)
        with simulated_driver(arch) as run:
            samples.add[(1,)](x, x, out, 64, BLOCK=64)
            assert driver.active.get_current_target().arch == arch
        assert torch.equal(out, 2 * x)
        opcodes.setdefault(arch, []).append(run.launches[0].counts)
    assert opcodes[80][0] == opcodes[80][1]


def test_everything_is_as_before_after_it():
    before = driver._active
    with triton_sim(80):
        assert "cpu" in _triton.DEVICES
        assert ops.backend() == "triton"
        with triton_sim(86):
            assert "cpu" in _triton.DEVICES
        assert "cpu" in _triton.DEVICES  # still within the outer one
    assert "cpu" not in _triton.DEVICES
    assert ops.backend() == "auto"
    assert driver._active is before
    with pytest.raises(RuntimeError, match="on purpose"), triton_sim(80):
        raise RuntimeError("on purpose")
    assert "cpu" not in _triton.DEVICES
    assert driver._active is before


def test_unknown_architecture():
    with pytest.raises(ValueError, match="arch must be one of"), triton_sim(42):
        pass


def test_mutations_of_a_pipelined_matmul_are_noticed():
    """Every barrier, wait and commit of the compiled kernel is deleted in turn.

    What changes the result is a race, and is reported as one. Six deletions survive: they change
    nothing (four waits that cover for one another, a barrier with nothing new behind it, a commit
    that only separates two groups that are waited for together).
    """
    a = random(64, 256, dtype=torch.bfloat16)
    b = random(64, 256, dtype=torch.bfloat16, seed=1)
    c = torch.empty(64, 64, dtype=torch.bfloat16)
    options = {"BM": 64, "BN": 64, "BK": 32, "PRECISION": "ieee", "num_stages": 3}
    with simulated_driver(80):
        compiled = samples.matmul.warmup(a, b, c, 64, 64, 256, **options, grid=(1, 1))
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared

    def outcome(text):
        result = torch.full((64, 64), torch.nan, dtype=torch.bfloat16)
        args = [a, b, result, 64, 64, 256]
        try:
            Program(text).launch("matmul", (1, 1, 1), (128, 1, 1), args, shared)
        except Race:
            return "caught"
        return "survives" if torch.equal(result, expected) else "wrong"

    expected = multiply_at_once(ptx, shared, a, b)
    exact = a.double() @ b.double().T
    assert (expected.double() - exact).norm() <= 2**-8 * exact.norm()
    places = list(
        re.finditer(r"bar\.sync[^;]*;|cp\.async\.wait_group[^;]*;|cp\.async\.commit_group;", ptx)
    )
    outcomes = {
        f"{place[0]} #{i}": outcome(ptx[: place.start()] + ptx[place.end() :])
        for i, place in enumerate(places)
    }
    results = list(outcomes.values())
    assert len(results) >= 17, outcomes
    assert "wrong" not in results, outcomes
    assert results.count("survives") <= 6, outcomes
    for pattern in (r"cp\.async\.wait_group[^;]*;", r"bar\.sync[^;]*;"):  # all at once
        assert outcome(re.sub(pattern, "", ptx)) == "caught"
    # The loop's waits cover for one another: without both there is none.
    inside = [place for place in places if "wait_group" in place[0]][2:4]
    without = ptx[: inside[0].start()] + ptx[inside[1].end() :]
    assert outcome(without) == "caught"


def multiply_at_once(ptx, shared, a, b):
    result = torch.full((64, 64), torch.nan, dtype=torch.bfloat16)
    Program(ptx).launch("matmul", (1, 1, 1), (128, 1, 1), [a, b, result, 64, 64, 256], shared)
    return result
