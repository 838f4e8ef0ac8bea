"""lora_linear against the float64 reference, on every backend: numbers and masks."""

import itertools

import pytest
import torch
from backends import GPU, TRITON
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_cases import DTYPES, NAMES, WEIGHTS, check, leaves, make, to_float64
from tolerance import assert_same
from torch.utils.checkpoint import checkpoint

from fusetune import ops
from fusetune.reference.dropout import keep_mask, new_seed

# The full grid of everything would be 10^5 cases. The kernels treat these independently: shape,
# dtype and weight (which matmul), rank (how the tail is cut), dropout, and which optional parts
# there are. So each is swept whole at one odd setting of the rest (dropout at every second shape;
# nested statistics, decoded before anything else happens, with shapes only); hypothesis mixes all.

SHAPES = (
    (1, 48, 64, 0.0),
    (1, 7, 1, 0.3),
    (2, 33, 130, 0.0),
    (8, 128, 256, 0.3),
    (9, 64, 577, 0.3),
    (37, 97, 101, 0.0),
    (130, 257, 320, 0.3),
    (133, 101, 1301, 0.3),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(backend, shape, kind, dtype):
    *sizes, dropout_p = shape
    check(make(*sizes, 8, dtype, kind), dropout_p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("r", [1, 3, 8, 16, 64, 256])
def test_ranks(backend, r, kind, dtype):
    check(make(19, 83, 131, r, dtype, kind), 0.1)


# On GPUs: M, N, K, r, dtype of activations, weight, dtype of adapters, dropout. Simulated they take
# a second each, so they are few: every kernel meets every dtype, dropout and a K that is and is not
# a multiple of 4, tiles of both sizes, ranks below, at and above a tile's, both kinds of absmax.
F32, F16, BF16 = DTYPES
ON_GPU = (
    (1, 48, 64, 8, BF16, "nf4", F32, 0.0),
    (9, 64, 101, 1, F16, "fp4 nested", F32, 0.3),
    (70, 136, 200, 16, BF16, "fp4 nested", F32, 0.3),
    (66, 40, 136, 16, BF16, "nf4", BF16, 0.0),
    (19, 33, 72, 64, F16, "nf4", F16, 0.5),
    (67, 130, 40, 3, F16, "nf4", F32, 0.0),
    (17, 24, 48, 256, BF16, "nf4", F32, 0.1),
    (33, 65, 50, 20, F32, "nf4", F32, 0.3),
    (2, 48, 64, 8, F32, "fp4 nested", F32, 0.0),
)
DENSE_ON_GPU = (
    (37, 97, 101, 16, F32, "dense", F32, 0.0),
    (19, 40, 48, 64, BF16, "dense", F32, 0.3),
    (66, 136, 64, 5, F16, "dense", F16, 0.3),
    (35, 40, 48, 8, BF16, "transposed", F32, 0.3),
)


@pytest.mark.parametrize(
    ("backend", "case"),
    [*itertools.product(GPU, ON_GPU), *itertools.product(TRITON, DENSE_ON_GPU)],
    indirect=["backend"],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_on_gpus(backend, case):
    *sizes, dtype, kind, adapter, dropout_p = case
    check(make(*sizes, dtype, kind, adapter), dropout_p)


@pytest.mark.parametrize("parts", [*itertools.product([False, True], repeat=2)])
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("m", [5, 50])
def test_optional_biases(backend, m, kind, parts):
    arguments = make(m, 33, 70, 4, kind=kind)
    for name, present in zip(("bias", "lora_bias"), parts, strict=True):
        if not present:
            arguments[name] = None
    check(arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("m", [5, 50])
def test_adapters_in_16_bits(backend, m, kind, dtype):
    check(make(m, 33, 70, 4, dtype, kind, adapter=dtype), 0.2)


@settings(max_examples=80, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 90),
    k=st.integers(1, 150),
    r=st.integers(1, 40),
    kind=st.sampled_from(sorted(WEIGHTS)),
    dtype=st.sampled_from(DTYPES),
    dropout_p=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(m, n, k, r, kind, dtype, dropout_p, seed):
    torch.manual_seed(seed)
    with ops.use_backend("cpu"):
        check(make(m, n, k, r, dtype, kind), dropout_p)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_gradients_numerically(kind):
    arguments = to_float64(make(3, 5, 9, 2, kind=kind))
    arguments = leaves(arguments)
    arguments["scaling"] = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    names = (*NAMES, "scaling")

    def function(*values):
        torch.manual_seed(1)  # the same mask at every call
        return ops.lora_linear(**(arguments | dict(zip(names, values, strict=True))), dropout_p=0.4)

    assert torch.autograd.gradcheck(function, [arguments[name] for name in names])


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("m", [4, 60])
def test_forward_and_backward_share_the_mask(backend, m, kind):
    """With a zero base weight and A, B of ones, y and dx show which elements of x were kept."""
    k = 70
    weight = torch.zeros(1, k) if kind == "dense" else ops.quantize_4bit(torch.zeros(1, k))
    x = (torch.rand(m, k) + 0.5).requires_grad_()
    a, b = torch.ones(1, k, requires_grad=True), torch.ones(1, 1)
    torch.manual_seed(7)
    y = ops.lora_linear(x, weight, a, b, 1.0, dropout_p=0.4)
    y.sum().backward()
    torch.manual_seed(7)
    kept = keep_mask(m, k, 0.4, new_seed(x.device)) / 0.6
    assert_same(x.grad, kept)
    assert_same(y.detach(), (x.detach() * kept).sum(1, keepdim=True))
    assert_same(a.grad, (x.detach() * kept).sum(0, keepdim=True))


def test_masks_follow_the_generator_and_differ_between_calls(backend):
    arguments = make(6, 9, 64, 2)
    state = torch.get_rng_state()
    first = ops.lora_linear(**arguments, dropout_p=0.5)
    second = ops.lora_linear(**arguments, dropout_p=0.5)
    torch.set_rng_state(state)
    again = ops.lora_linear(**arguments, dropout_p=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_no_dropout_draws_no_number(backend):
    arguments = make(6, 9, 64, 2)
    state = torch.get_rng_state()
    expected = ops.lora_linear(**arguments)
    assert torch.equal(ops.lora_linear(**arguments, dropout_p=0.5, training=False), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropping_everything_leaves_the_base(backend):
    arguments = make(6, 9, 64, 2) | {"lora_bias": None}
    got = ops.lora_linear(**arguments, dropout_p=1.0)
    base = ops.linear_4bit(arguments["x"], arguments["weight"], arguments["bias"])
    assert_same(got, base)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_masks(backend, use_reentrant):
    arguments = make(6, 9, 64, 2)

    def two_layers(x, a, b):
        layer = arguments | {"x": x, "lora_A": a, "lora_B": b}
        once = ops.lora_linear(**layer, dropout_p=0.3)
        return once.sum(1) + ops.lora_linear(**layer, dropout_p=0.3).sum(1)

    def grads(function):
        inputs = [arguments[n].clone().requires_grad_() for n in ("x", "lora_A", "lora_B")]
        torch.manual_seed(5)
        function(*inputs).sum().backward()
        return [t.grad for t in inputs]

    plain = grads(two_layers)
    recomputed = grads(lambda *i: checkpoint(two_layers, *i, use_reentrant=use_reentrant))
    for got, expected in zip(recomputed, plain, strict=True):
        assert torch.equal(got, expected)
