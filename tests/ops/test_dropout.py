"""The counter-based dropout: the generator, the statistics, and the kernels."""

import math
from functools import partial

import pytest
import torch
from backends import simulated
from torch.utils.checkpoint import checkpoint

from fusetune import _native, ops
from fusetune.ops import _cpu, _triton
from fusetune.reference import dropout as reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def seed_of(value):
    return torch.tensor([value], dtype=torch.int64)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Known answers of the Random123 library for philox4x32, 10 rounds.
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    got = reference.philox(tuple(torch.tensor([c]) for c in counter), tuple(key))
    assert " ".join(f"{int(word):08x}" for word in got) == words


def test_keep_rate_and_independence():
    n = 1 << 16
    for p in (0.05, 0.5, 0.9):
        one, other = (reference.keep_mask(256, n // 256, p, seed_of(s)).double() for s in (1, 2))
        # A count of n draws has standard deviation sqrt(n p (1 - p)); five of them: 6e-7 by chance.
        bound = 5 * math.sqrt(p * (1 - p) / n)
        assert abs(one.mean() - (1 - p)) < bound
        both = (one * other).mean() - (1 - p) ** 2
        assert abs(both) < 5 * math.sqrt((1 - p) ** 2 * (1 - (1 - p) ** 2) / n)
        neighbours = (one[:, 1:] * one[:, :-1]).mean() - (1 - p) ** 2
        # Products of neighbours share factors: at most three times the variance of free ones.
        assert abs(neighbours) < 5 * math.sqrt(3 * (1 - p) ** 2 / one.numel())


def test_expected_value_is_kept():
    x = torch.rand(64, 256) + 0.5
    draws = torch.stack([reference.dropout(x, 0.3, seed_of(s)) for s in range(200)])
    # Each draw of an element has variance x^2 p / (1 - p); the mean over all has it divided by n.
    bound = 5 * (x.square().mean() * 0.3 / 0.7 / draws.numel()).sqrt()
    assert abs(draws.mean() - x.mean()) < bound


@pytest.mark.parametrize("columns", [1, 3, 4, 7])
def test_a_block_of_rows(columns):
    """Wherever it begins within a counter's four words."""
    seed = seed_of(2**40 + 3)
    whole = reference.keep_mask(37, columns, 0.4, seed)
    for first, rows in ((0, 37), (1, 5), (6, 1), (30, 7), (12, 0)):
        got = reference.keep_mask(rows, columns, 0.4, seed, first)
        assert got.equal(whole[first : first + rows])


def test_extreme_probabilities():
    x = torch.randn(5, 7)
    assert torch.equal(reference.dropout(x, 1.0, seed_of(1)), torch.zeros(5, 7))
    assert reference.keep_mask(5, 7, 0.0, seed_of(1)).all()
    assert reference.dropout(x, 0.5, None) is x


def test_seed_follows_torchs_generator():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = reference.new_seed(x := torch.device("cpu")), reference.new_seed(x)
    assert first != second
    torch.set_rng_state(state)
    assert reference.new_seed(x) == first


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 64), (33, 130), (2, 4099)])
def test_native_mask_is_the_reference(shape, p, dtype):
    x = torch.randn(shape).to(dtype)
    for value in (0, 1, 2**32 + 5, 2**63 - 2):
        out = torch.full_like(x, torch.nan)
        _native.C.dropout(_cpu.matrix(x), *shape, _cpu.dropout(p, seed_of(value)), _cpu.matrix(out))
        assert torch.equal(out, reference.dropout(x, p, seed_of(value)))


@pytest.mark.parametrize(
    ("dtype", "arch"), [(torch.float32, 80), (torch.float16, 75), (torch.bfloat16, 80)]
)
@pytest.mark.parametrize(
    ("shape", "seed", "p"),
    [((1, 1), 0, 0.5), ((3, 5), 2**63 - 2, 0.3), ((7, 64), 2**32 + 5, 1.0), ((5, 1028), 1, 0.05)],
)
def test_triton_kernel_is_the_reference(shape, seed, p, dtype, arch):
    """What is kept bit for bit, also of a matrix with a distance between rows; and the rest."""
    x = torch.randn(shape[0], shape[1] + 3).to(dtype)[:, : shape[1]]
    kept, rest = torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan).to(dtype)
    with simulated("triton-sim", arch):
        _triton.dropout(x, kept, p, seed_of(seed), rest)
    mask = reference.keep_mask(*shape, p, seed_of(seed))
    assert torch.equal(kept, torch.where(mask, x, 0))
    factor = torch.tensor(reference.threshold_and_scale(p)[1], dtype=torch.float32)
    exact = x.double() - factor.double() * kept.double()
    # One FMA in fp32, then one rounding to dtype: of half a spacing each.
    narrow, eps32 = torch.finfo(dtype), torch.finfo(torch.float32).eps
    size = exact.abs().clamp(min=narrow.smallest_normal)
    assert ((rest.double() - exact).abs() <= (narrow.eps + eps32) / 2 * size * (1 + 2**-10)).all()


# --- the op ---------------------------------------------------------------------------------------


def seeded(function):
    torch.manual_seed(11)
    return function()


def written_out(x, p):
    """From the next seed of torch's generator."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return reference.dropout(rows, p, reference.new_seed(x.device))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 130), (0, 4), (4, 0), (2, 4099)])
@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
def test_op_and_its_gradient(shape, p, dtype):
    x = torch.randn(shape).to(dtype).requires_grad_()
    upper = torch.randn(shape).to(dtype)
    y = seeded(lambda: ops.dropout(x, p))
    assert torch.equal(y, seeded(lambda: written_out(x, p)).view(shape))
    (gradient,) = torch.autograd.grad(y, x, upper)
    assert torch.equal(gradient, seeded(lambda: written_out(upper, p)).view(shape))


@pytest.mark.parametrize("layout", ["transposed", "every other", "expanded"])
def test_op_of_any_strides(layout):
    x = {
        "transposed": torch.randn(8, 6).T,
        "every other": torch.randn(6, 16)[:, ::2],
        "expanded": torch.randn(1, 8).expand(6, 8),
    }[layout]
    assert torch.equal(seeded(lambda: ops.dropout(x, 0.4)), seeded(lambda: written_out(x, 0.4)))


def test_op_without_dropout_is_the_identity():
    x = torch.randn(3, 4)
    state = torch.get_rng_state()
    assert ops.dropout(x, 0.0) is x
    assert ops.dropout(x, 0.7, training=False) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_op_under_checkpoints():
    x = torch.randn(5, 8)

    def function(x):
        return ops.dropout(x, 0.5).square()

    def gradient(run):
        leaf = x.detach().requires_grad_()
        seeded(lambda: run(leaf)).sum().backward()
        return leaf.grad

    want = gradient(function)
    for reentrant in (False, True):
        got = gradient(partial(checkpoint, function, use_reentrant=reentrant))
        assert torch.equal(got, want)


def test_opcheck_and_compiling():
    x = torch.randn(3, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.fusetune.dropout.default, (x, 0.3, seed_of(4)))
    compiled = torch.compile(ops.dropout, fullgraph=True, backend="aot_eager")
    assert torch.equal(seeded(lambda: compiled(x, 0.3)), seeded(lambda: ops.dropout(x, 0.3)))


@pytest.mark.parametrize(
    ("x", "p", "error", "message"),
    [
        (torch.ones(3, dtype=torch.int64), 0.1, TypeError, "x must be float16"),
        ([1.0], 0.1, TypeError, "x must be a tensor, got list"),
        (torch.ones(3), -0.1, ValueError, "p must be from 0 to 1, got -0.1"),
        (torch.ones(3), float("nan"), ValueError, "p must be from 0 to 1, got nan"),
    ],
)
def test_bad_arguments(x, p, error, message):
    with pytest.raises(error, match=message):
        ops.dropout(x, p)
