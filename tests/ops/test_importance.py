"""importance against its definition, bit for bit where sums do not matter, and its interface."""

import pytest
import torch
from tolerance import assert_close

from fusetune import _native, ops
from fusetune.ops import importance, set_isa, use_backend
from fusetune.reference import importance as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ISAS = _native.C.available_isas() if _native.C else []
SHAPES = [(4, 9), (1, 1), (6, 1), (12, 1500), (4, 9), (2, 2100), (1500, 12), (3, 33)]


def defined(*given):
    return reference.importance(reference.Given(*given))


def inputs(dtype=torch.float32, shapes=SHAPES):
    """(weights, grads, sensitivity, uncertainty)"""
    sets = [[torch.randn(*shape).to(dtype) for shape in shapes] for _ in range(4)]
    return (*sets[:2], *([each.abs() for each in tensors] for tensors in sets[2:]))


def results(function, given, dim, dtype=None, grads=True):
    w, g, s, u = ([each.to(dtype or each.dtype, copy=True) for each in of] for of in given)
    return function(w, g if grads else None, s, u, 0.85, 0.9, dim), s, u


def check(given, dim, grads=True):
    got = results(importance, given, dim, grads=grads)
    eager = results(defined, given, dim, grads=grads)
    exact = results(defined, given, dim, torch.float64, grads)
    for kind in (1, 2):  # every operation on an element rounds as PyTorch's: PEFT's averages
        for mine, theirs in zip(got[kind], eager[kind], strict=True):
            assert torch.equal(mine, theirs)
    assert_close("scores", got[0].to(eager[0].dtype), exact[0], eager[0])


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_averages_and_scores(dim, dtype, backend):
    if backend == "cpu" and dtype == torch.float64:
        with pytest.raises(ValueError, match="cannot run on backend 'cpu'"):
            importance(*inputs(dtype), 0.85, 0.9, dim)
        return
    check(inputs(dtype), dim)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_multi_tensor_operations(dim, dtype, monkeypatch):
    """What runs on a GPU, here on the CPU."""
    given = inputs(dtype)
    foreach = next(impl.run for impl in ops.OPS["importance"].impls if impl.name == "torch")
    got = results(lambda *args: foreach(reference.Given(*args)), given, dim)
    expected = results(defined, given, dim)
    for kind in (1, 2):
        assert all(torch.equal(*each) for each in zip(got[kind], expected[kind], strict=True))
    torch.testing.assert_close(got[0], expected[0])


@pytest.mark.skipif(_native.C is None, reason="no native module")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [0, 1])
def test_every_instruction_set(isa, dim):
    before = _native.C.isa()
    set_isa(isa)
    try:
        with use_backend("cpu"):
            shapes = [(5, n) for n in (1, 3, 15, 17, 31, 33, 100)]
            check(inputs(shapes=[*shapes, (203, 12), (40, 1), (100, 31)]), dim)
    finally:
        set_isa(before)


@pytest.mark.parametrize("dim", [0, 1])
def test_without_gradients_the_averages_stay(dim, backend):
    given = inputs()
    _, s, u = results(importance, given, dim, grads=False)
    assert all(torch.equal(*each) for each in zip(s + u, given[2] + given[3], strict=True))
    check(given, dim, grads=False)


def test_strided_matrices(backend):
    given = inputs(shapes=[(5, 8), (3, 3)])
    given = [[each.T for each in tensors] for tensors in given]
    w, g, s, u = ([each.T.clone().T for each in tensors] for tensors in given)
    assert not w[0].is_contiguous()
    expected = results(defined, given, 1)
    scores = importance(w, g, s, u, 0.85, 0.9, 1)
    torch.testing.assert_close(scores, expected[0])
    assert all(torch.equal(*each) for each in zip(s + u, expected[1] + expected[2], strict=True))


def test_empty_matrices(backend):
    given = inputs(shapes=[(0, 4), (3, 4), (0, 4)])
    scores, _, _ = results(importance, given, 1)
    torch.testing.assert_close(scores, results(defined, given, 1)[0])
    scores, _, _ = results(importance, given, 0)
    assert scores.isnan().tolist() == [True] * 4 + [False] * 4 + [True] * 4


def test_overflow_and_nan_are_pefts(backend):
    given = inputs(shapes=[(2, 40)])
    given[1][0][0, 3], given[1][0][1, 5] = torch.inf, torch.nan
    got, expected = (results(f, given, 1) for f in (importance, defined))
    assert torch.equal(got[0].isnan(), expected[0].isnan())
    assert torch.equal(got[1][0].isinf(), expected[1][0].isinf())


def test_parameters_and_threads(backend):
    """Parameters with gradients, and more matrices than threads: one result."""
    given = inputs(shapes=[(4, 300)] * 20)
    weights = [torch.nn.Parameter(each) for each in given[0]]
    threads = torch.get_num_threads()
    seen = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            s, u = ([each.clone() for each in of] for of in given[2:])
            seen.append(importance(weights, given[1], s, u, 0.85, 0.9, 0))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*seen)
    assert not seen[0].requires_grad


def change(position, value):
    def changed():
        arguments = [*inputs(shapes=[(2, 3), (2, 3)]), 0.85, 0.85, 1]
        arguments[position] = value
        return arguments

    return changed


SHORT, OTHER = [torch.ones(2, 3)], [torch.ones(2, 3), torch.ones(3, 2)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (change(0, []), ValueError, "weights is empty"),
        (change(0, [torch.ones(2), torch.ones(2)]), ValueError, "weights must be matrices"),
        (change(0, [1, 2]), TypeError, r"weights\[0\] must be a tensor, got int"),
        (change(1, SHORT), ValueError, "grads must have the 2 shapes of weights"),
        (change(2, OTHER), ValueError, "sensitivity must have the 2 shapes"),
        (
            change(3, [torch.ones(2, 3).half()] * 2),
            TypeError,
            "uncertainty must all be torch.float32",
        ),
        (change(3, [torch.ones(2, 3, device="meta")] * 2), TypeError, "uncertainty must all be"),
        (change(4, 1.0), ValueError, "beta1 must be between 0 and 1, got 1.0"),
        (change(5, 0), ValueError, "beta2 must be between 0 and 1, got 0"),
        (change(6, -1), ValueError, "dim must be 0 or 1, got -1"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        importance(*arguments())
