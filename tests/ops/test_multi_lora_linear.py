"""multi_lora_linear against the float64 reference, and the reference against PEFT's arithmetic."""

import itertools

import pytest
import torch
from lora_cases import DTYPES
from multi_lora_cases import check, eager, leaves, make, mapped, named_tensors, results
from tolerance import assert_same

from fusetune import ops
from fusetune.reference.dropout import keep_mask, new_seed

# Shape of x without K, N, K, ranks, adapter_of: few rows and many, ragged, blocks that are and are
# not neighbours, adapters without a row, rows without an adapter, more than a task's 256 rows.
CASES = (
    ((8,), 48, 64, [4, 8, 1], None),
    ((8,), 48, 64, [4, 8, 1], [0, 1, 2, -1, 1, 0, 2, 1]),
    ((5, 7), 33, 130, [16, 3], None),
    ((5, 7), 33, 130, [16, 3], [1, 0, 1, -1, 1]),
    ((3, 2, 9), 97, 577, [5, 20, 16], [2, 2, 0]),
    ((4, 100), 64, 128, [16, 16], [0, 0, 0, -1]),
    ((2, 150), 130, 101, [3, 64], None),
    ((4, 5), 33, 70, [3, 2], [-1, -1, -1, -1]),
)
MODES = [None, [1, 0, -1, 2, 1, 1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes(backend, case, kind, dtype):
    *sizes, adapter_of = case
    dropout_p = [0.3, 0.0, 0.5][: len(sizes[-1])]
    check(make(*sizes, dtype, kind), adapter_of=adapter_of, dropout_p=dropout_p)


@pytest.mark.parametrize("adapter_of", MODES, ids=["all", "by row"])
@pytest.mark.parametrize("kind", ["dense", "nf4", "fp4 nested"])
def test_without_dropout_and_biases(backend, kind, adapter_of):
    arguments = make((6, 3), 40, 70, [4, 2, 9], kind=kind)
    check(arguments, adapter_of=adapter_of)
    arguments["lora_bias"] = [None, None, None]
    check(arguments, adapter_of=adapter_of)


@pytest.mark.parametrize("adapter", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("adapter_of", MODES, ids=["all", "by row"])
def test_adapters_in_16_bits(backend, adapter_of, adapter):
    check(make((6, 5), 33, 70, [4, 2, 9], adapter, adapter=adapter), adapter_of=adapter_of)


# 1 / (1 - p), an fp32 number by definition, is exact for these p.
@pytest.mark.parametrize("dropout_p", [0.0, [0.5, 0.0, 0.75]], ids=str)
@pytest.mark.parametrize("adapter_of", MODES, ids=["all", "by row"])
def test_the_reference_is_what_peft_computes(adapter_of, dropout_p):
    arguments = mapped(make((6, 5), 9, 70, [4, 2, 9], kind="dense"), torch.Tensor.double)
    dy = torch.randn(6, 5, 9, dtype=torch.float64)
    options = {"adapter_of": adapter_of, "dropout_p": dropout_p}
    torch.manual_seed(3)
    expected = results(eager, arguments, dy, **options)
    torch.manual_seed(3)
    got = results(ops.multi_lora_linear, arguments, dy, **options)
    for name, value in got.items():
        assert_same(value, expected[name], name)


@pytest.mark.parametrize("adapter_of", MODES, ids=["all", "by row"])
def test_gradients_numerically(adapter_of):
    arguments = leaves(mapped(make((6,), 3, 9, [2, 1, 3], kind="dense"), torch.Tensor.double))
    arguments["weight"] = arguments["weight"].detach()
    scaling = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def function(x, bias, scaling, *factors):
        torch.manual_seed(1)  # the same masks at every call
        return ops.multi_lora_linear(
            x,
            arguments["weight"],
            factors[:3],
            factors[3:],
            [1.5, scaling, 1.0],
            bias=bias,
            lora_bias=arguments["lora_bias"],
            adapter_of=adapter_of,
            dropout_p=[0.4, 0.2, 0.0],
        )

    factors = (*arguments["lora_A"], *arguments["lora_B"])
    inputs = (arguments["x"], arguments["bias"], scaling, *factors)
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_each_row_is_its_adapters_alone(backend, kind):
    a = make((5, 4), 33, 70, [4, 2, 9], kind=kind)
    rows = [2, 0, -1, 1, 0]
    got = ops.multi_lora_linear(**a, adapter_of=rows)
    for row, owner in enumerate(rows):
        alone = {"x": a["x"][row], "weight": a["weight"], "bias": a["bias"]}
        names = ("lora_A", "lora_B", "scaling", "lora_bias")
        alone |= {name: a[name][max(owner, 0)] for name in names}
        if owner < 0:
            alone |= {"scaling": 0.0}
        assert_same(got[row], ops.lora_linear(**alone), f"row {row}")


def test_sum_of_two_of_the_same_is_one_of_double_scaling(backend):
    a = make((3, 4), 33, 70, [4, 4])
    for name in ("lora_A", "lora_B", "lora_bias", "scaling"):
        a[name] = [a[name][0]] * 2
    one = a | {name: a[name][0] for name in ("lora_A", "lora_B", "lora_bias")}
    assert_same(ops.multi_lora_linear(**a), ops.lora_linear(**(one | {"scaling": 3.0})))


@pytest.mark.parametrize("adapter_of", [None, [1, 0, 1]], ids=["all", "by row"])
def test_frozen_parts_get_no_gradient(backend, adapter_of):
    a = make((3, 4), 33, 70, [4, 2])
    expected = results(
        ops.multi_lora_linear, a, torch.ones(3, 4, 33), adapter_of=adapter_of, dropout_p=0.0
    )
    names = list(named_tensors(a))
    for trained in (["x"], ["lora_B[1]"], ["lora_A[0]", "x"], ["lora_A[1]", "lora_B[0]"], ["bias"]):
        given = leaves(a)
        tensors = named_tensors(given)
        for name in set(names) - set(trained):
            tensors[name].requires_grad_(False)
        ops.multi_lora_linear(**given, adapter_of=adapter_of).backward(torch.ones(3, 4, 33))
        for name in names:
            grad = tensors[name].grad
            assert (grad is not None) == (name in trained), name
            if grad is not None:
                assert_same(grad, expected[f"d{name}"], name)


@pytest.mark.parametrize("adapter_of", [None, [1, 0, 1, -1, 1, 0]], ids=["all", "by row"])
def test_threads_change_nothing(adapter_of):
    arguments = make((6, 100), 600, 530, [4, 16], kind="dense")
    dy = torch.randn(6, 100, 600)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(1)
            given = {"adapter_of": adapter_of, "dropout_p": [0.2, 0.0]}
            with ops.use_backend("cpu"):
                found.append(results(ops.multi_lora_linear, arguments, dy, **given))
    finally:
        torch.set_num_threads(threads)
    # x and the factors: y, and torch's own sums for the biases, may depend on the threads.
    for name in ("dlora_A[0]", "dlora_A[1]", "dlora_B[0]", "dlora_B[1]"):
        assert torch.equal(found[0][name], found[1][name]), name


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter_of", [None, [1, 0, 1, -1]], ids=["all", "by row"])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_every_adapter_has_a_mask_of_its_own(backend, kind, adapter_of):
    """With a zero base weight and A, B of ones, y and dx show which elements of x were kept."""
    k, rows = 70, 4
    weight = torch.zeros(1, k) if kind == "dense" else ops.quantize_4bit(torch.zeros(1, k))
    x = (torch.rand(rows, k) + 0.5).requires_grad_()
    factors = ([torch.ones(1, k, requires_grad=True) for _ in range(2)], [torch.ones(1, 1)] * 2)
    torch.manual_seed(7)
    options = {"adapter_of": adapter_of, "dropout_p": [0.4, 0.2]}
    y = ops.multi_lora_linear(x, weight, *factors, [1.0, 1.0], **options)
    y.sum().backward()
    torch.manual_seed(7)
    seeds = new_seed(x.device, 2)
    assert seeds[0] != seeds[1]
    kept = [keep_mask(rows, k, p, seeds[i]) / (1 - p) for i, p in enumerate((0.4, 0.2))]
    if adapter_of is not None:
        for i, mask in enumerate(kept):
            mask *= torch.tensor(adapter_of).eq(i).unsqueeze(1)
    assert_same(x.grad, kept[0] + kept[1])
    assert_same(y.detach(), (x.detach() * (kept[0] + kept[1])).sum(1, keepdim=True))
    for i, lora_A in enumerate(factors[0]):
        assert_same(lora_A.grad, (x.detach() * kept[i]).sum(0, keepdim=True))


def test_no_dropout_draws_no_number(backend):
    arguments = make((6, 2), 9, 64, [2, 3])
    state = torch.get_rng_state()
    expected = ops.multi_lora_linear(**arguments)
    got = ops.multi_lora_linear(**arguments, dropout_p=0.5, training=False)
    assert torch.equal(got, expected)
    assert torch.equal(torch.get_rng_state(), state)


# --- layouts and empty shapes ---------------------------------------------------------------------


@pytest.mark.parametrize("adapter_of", [None, [0, 1, 0]], ids=["all", "by row"])
def test_any_layout_of_the_inputs(backend, adapter_of):
    a = make((3, 4), 33, 70, [4, 2], kind="dense")
    expected = results(ops.multi_lora_linear, a, torch.ones(3, 4, 33), adapter_of=adapter_of)
    a["x"] = a["x"].transpose(0, 1).contiguous().transpose(0, 1)
    a["lora_A"] = [t.T.contiguous().T for t in a["lora_A"]]
    a["lora_B"] = [torch.cat([t, t], 1)[:, : t.shape[1]] for t in a["lora_B"]]
    a["weight"] = a["weight"].T.contiguous().T
    got = results(ops.multi_lora_linear, a, torch.ones(1).expand(3, 4, 33), adapter_of=adapter_of)
    for name, value in got.items():
        assert_same(value, expected[name], name)


@pytest.mark.parametrize(
    ("shape", "k", "adapter_of"),
    [
        *itertools.product([(0, 4), (3, 0), (0,)], [0, 64], [None]),
        *[((3, 0), 64, [0, 1, -1]), ((0, 4), 64, []), ((3, 2), 0, [0, 1, -1]), ((3, 2), 0, None)],
    ],
)
def test_empty_shapes(backend, shape, k, adapter_of):
    a = make(shape, 9, k, [4, 2], kind="dense")
    if k == 0:
        a["lora_A"] = [torch.zeros(4, 0), torch.zeros(2, 0)]
    got = results(ops.multi_lora_linear, a, torch.randn(*shape, 9), adapter_of=adapter_of)
    with ops.use_backend("reference"):
        in_double = mapped(a, torch.Tensor.double)
        dy = torch.zeros(*shape, 9, dtype=torch.float64)
        expected = results(ops.multi_lora_linear, in_double, dy, adapter_of=adapter_of)
    assert_same(got["y"], expected["y"])
    assert not any(value.isnan().any() for value in got.values())
    if not a["x"].numel():
        assert all(not got[f"dlora_{part}[{i}]"].any() for part in "AB" for i in range(2))
