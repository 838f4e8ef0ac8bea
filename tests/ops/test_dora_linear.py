"""dora_linear against the float64 reference, on every backend, and against PEFT's formula."""

import itertools

import pytest
import torch
from backends import TRITON
from dora_cases import NAMES, check, eager, leaves, make, results
from lora_cases import DTYPES, WEIGHTS, to_float64
from tolerance import assert_same
from torch.utils.checkpoint import checkpoint

from fusetune import ops
from fusetune.reference.dropout import new_seed

F32, F16, BF16 = DTYPES
SHAPES = (
    (1, 48, 64, 8, 0.0),
    (1, 7, 1, 1, 0.3),
    (2, 33, 130, 3, 0.0),
    (9, 64, 577, 16, 0.3),
    (37, 97, 101, 20, 0.0),
    (70, 257, 320, 16, 0.3),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(backend, shape, kind, dtype):
    *sizes, dropout_p = shape
    check(make(*sizes, dtype, kind), dropout_p)


# M, N, K, r, dtype of activations, weight, dtype of adapters, dropout.
ON_GPU = (
    (1, 48, 64, 8, BF16, "nf4", F32, 0.0),
    (9, 64, 101, 1, F16, "fp4 nested", F32, 0.3),
    (70, 40, 136, 16, BF16, "fp4 nested", F32, 0.0),
    (19, 33, 72, 16, F16, "nf4", F16, 0.0),
    (33, 65, 56, 20, F32, "nf4", F32, 0.3),
    (37, 40, 101, 16, F32, "dense", F32, 0.0),
    (19, 40, 48, 5, BF16, "dense", F32, 0.3),
)


@pytest.mark.parametrize(
    ("backend", "case"), [*itertools.product(TRITON, ON_GPU)], indirect=["backend"], ids=str
)
def test_on_gpus(backend, case):
    *sizes, dropout_p = case
    check(make(*sizes), dropout_p)


@pytest.mark.parametrize("backend", TRITON, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_gradients_on_gpus(backend, dtype):
    """Nothing is kept: the factor is then applied where the matmul writes its result."""
    arguments = make(20, 40, 72, 8, dtype)
    y = ops.dora_linear(**leaves(arguments, ("x",)))
    with torch.no_grad():
        assert_same(ops.dora_linear(**arguments), y.detach())
    assert_same(y.detach(), ops.dora_linear(**leaves(arguments)).detach())


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("m", [5, 50])
def test_adapters_in_16_bits(backend, m, kind, dtype):
    check(make(m, 33, 70, 4, dtype, kind, adapter=dtype))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("m", [5, 50])
def test_without_a_bias(backend, m, dropout_p, kind):
    check(make(m, 33, 70, 4, kind=kind) | {"bias": None}, dropout_p)


# --- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_the_definition_is_pefts(kind, dropout_p):
    """Both in float64: y and every gradient, with the same mask."""
    arguments = to_float64(make(7, 9, 33, 3, kind=kind))
    dy = torch.randn(7, 9, dtype=torch.float64)
    torch.manual_seed(4)
    got = results(ops.dora_linear, arguments, dy, dropout_p=dropout_p)
    torch.manual_seed(4)
    seed = {"dropout_p": dropout_p, "seed": new_seed(dy.device)} if dropout_p else {}
    expected = results(eager, arguments, dy, **seed)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradients_numerically(kind, dropout_p):
    arguments = leaves(to_float64(make(3, 5, 9, 2, kind=kind)))
    arguments["scaling"] = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    norm = torch.rand(5, dtype=torch.float64) + 1  # given, as it is a constant
    names = (*NAMES, "scaling")

    def function(*values):
        torch.manual_seed(1)  # the same mask at every call
        given = arguments | dict(zip(names, values, strict=True))
        return ops.dora_linear(**given, norm=norm, dropout_p=dropout_p)

    assert torch.autograd.gradcheck(function, [arguments[name] for name in names])


def test_new_adapters_leave_the_base_layer_as_it_is(backend):
    """PEFT starts with lora_B of zeros and the magnitude of the weight's norms: c is 1."""
    arguments = make(12, 20, 64, 4)
    arguments["lora_B"].zero_()
    parts = [arguments[name] for name in ("weight", "lora_A", "lora_B", "scaling")]
    y = ops.dora_linear(**arguments | {"magnitude": ops.dora_norm(*parts)}, dropout_p=0.5)
    assert_same(y, ops.linear_4bit(arguments["x"], arguments["weight"], arguments["bias"]))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_norm_that_is_known_is_taken(backend, dropout_p):
    arguments, dy = make(12, 20, 64, 4), torch.randn(12, 20)
    parts = [arguments[name] for name in ("weight", "lora_A", "lora_B", "scaling")]
    norm = ops.dora_norm(*parts)

    def run(**options):
        torch.manual_seed(3)
        return results(ops.dora_linear, arguments, dy, dropout_p=dropout_p, **options)

    computed, given, double = run(), run(norm=norm), run(norm=2 * norm)
    for name in computed:
        assert torch.equal(given[name], computed[name]), name
    assert not torch.equal(double["y"], computed["y"])


# --- dropout --------------------------------------------------------------------------------------


def test_masks_follow_the_generator_and_differ_between_calls(backend):
    arguments = make(6, 9, 64, 2)
    state = torch.get_rng_state()
    first = ops.dora_linear(**arguments, dropout_p=0.5)
    second = ops.dora_linear(**arguments, dropout_p=0.5)
    torch.set_rng_state(state)
    assert torch.equal(ops.dora_linear(**arguments, dropout_p=0.5), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    ops.dora_linear(**arguments, dropout_p=0.5, training=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_mean_over_masks_is_y_without_dropout(backend):
    arguments = make(4, 6, 40, 2)
    count = 2000
    ys = torch.stack([ops.dora_linear(**arguments, dropout_p=0.4) for _ in range(count)])
    error = (ys.mean(0) - ops.dora_linear(**arguments)).abs()
    assert (error <= 5 * ys.std(0) / count**0.5 + 1e-4).all()


def test_dropping_everything_leaves_the_base(backend):
    arguments, dy = make(6, 9, 64, 2), torch.randn(6, 9)
    got = results(ops.dora_linear, arguments, dy, dropout_p=1.0)
    assert_same(got["y"], ops.linear_4bit(arguments["x"], arguments["weight"], arguments["bias"]))
    for name in ("dlora_A", "dlora_B", "dmagnitude"):
        assert not got[name].any()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_masks(backend, use_reentrant):
    arguments = make(6, 9, 64, 2)

    def two_layers(x, a, b):
        layer = arguments | {"x": x, "lora_A": a, "lora_B": b}
        once = ops.dora_linear(**layer, dropout_p=0.3)
        return once.sum(1) + ops.dora_linear(**layer, dropout_p=0.3).sum(1)

    def grads(function):
        inputs = [arguments[n].clone().requires_grad_() for n in ("x", "lora_A", "lora_B")]
        torch.manual_seed(5)
        function(*inputs).sum().backward()
        return [t.grad for t in inputs]

    plain = grads(two_layers)
    recomputed = grads(lambda *i: checkpoint(two_layers, *i, use_reentrant=use_reentrant))
    for got, expected in zip(recomputed, plain, strict=True):
        assert torch.equal(got, expected)
