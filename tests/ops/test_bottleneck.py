"""bottleneck and its gradients against float64, over everything that may be varied."""

import itertools

import pytest
import torch
from bottleneck_cases import DTYPES, FUNCTIONS, NAMES, check, eager, leaves, make, results
from tolerance import assert_same

from fusetune import _native, ops
from fusetune.ops.bottleneck import ACTIVATIONS

ISAS = _native.C.available_isas() if _native.C else []
SHAPES = [(0, 5, 3), (1, 1, 1), (1, 7, 3), (5, 16, 48), (33, 50, 1), (130, 100, 64), (97, 150, 256)]
SHAPES += [(20, 40, 300), (250, 290, 33)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend, shape, dtype):
    for activation in ("relu", "gelu"):
        check(make(*shape, dtype, activation=activation))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_activations(backend, activation, dtype):
    for spread in (0.3, 3.0, 30.0):
        arguments = make(40, 30, 20, dtype, activation=activation)
        arguments["down_weight"] *= spread
        check(arguments)


def test_all_activations_are_tested():
    assert tuple(FUNCTIONS) == ACTIVATIONS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", ["fp32", "own"])
@pytest.mark.parametrize("residual", [None, "same", "other"])
def test_biases_residual_and_dropout(backend, residual, weights, dtype):
    own = torch.float32 if weights == "fp32" else dtype
    for down, up, p in itertools.product((True, False), (True, False), (0.0, 0.4)):
        arguments = make(30, 50, 20, dtype, weights=own, dropout_p=p, activation="silu")
        if residual != "other":
            arguments["residual"] = residual
        if not down:
            arguments["down_bias"] = None
        if not up:
            arguments["up_bias"] = None
        check(arguments)


@pytest.mark.parametrize("groups", [(), (3,)])
@pytest.mark.parametrize("kind", ["float", "int", "0-d", "one", "channel", "each", "each channel"])
def test_scaling(backend, kind, groups):
    if kind.startswith("each") and not groups:
        pytest.skip("one scaling for each group needs groups")
    scaling = {
        "float": 0.7,
        "int": 4,
        "0-d": torch.randn(()),
        "one": torch.randn(1),
        "channel": torch.randn(50),
        "each": torch.randn(3, 1),
        "each channel": torch.randn(3, 50),
    }[kind]
    rows = [10, 0, 20] if groups else None
    # In 16 bits the error of a single number says little about that of another computation.
    for dtype in DTYPES if "channel" in kind else (torch.float32,):
        check(make(30, 50, 20, dtype, groups, scaling=scaling, rows=rows, dropout_p=0.2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [[7], [5, 0, 200], [0, 0], [100, 1, 97, 3]], ids=str)
def test_groups(backend, rows, dtype):
    for residual in ("same", "other"):
        arguments = make(sum(rows), 70, 20, dtype, (len(rows),), rows=rows, dropout_p=0.3)
        if residual == "same":
            arguments["residual"] = "same"
        check(arguments)


def test_groups_are_separate_calls(backend):
    rows = [40, 3, 57]
    arguments = make(100, 70, 20, groups=(3,), rows=rows)
    whole = ops.bottleneck(**arguments)
    start = 0
    for g, count in enumerate(rows):
        part = slice(start, start + count)
        own = {n: v[g] if n.startswith(("up", "down")) else v for n, v in arguments.items()}
        own.update(x=own["x"][part], residual=own["residual"][part], rows=None)
        assert torch.equal(ops.bottleneck(**own), whole[part])
        start += count


@pytest.mark.skipif(_native.C is None, reason="no native module")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    before = _native.C.isa()
    ops.set_isa(isa)
    try:
        with ops.use_backend("cpu"):
            for shape in ((3, 5, 2), (100, 145, 17), (13, 48, 7)):
                for activation in ACTIVATIONS:
                    check(make(*shape, dtype, activation=activation))
            check(make(50, 33, 9, dtype, dropout_p=0.5))
    finally:
        ops.set_isa(before)


@pytest.mark.skipif(_native.C is None, reason="no native module")
def test_the_number_of_threads_changes_no_bit():
    arguments, threads = make(1500, 200, 24, dropout_p=0.2), torch.get_num_threads()
    dy, got = torch.randn(1500, 200), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(5)
            got.append(results(ops.bottleneck, arguments, dy))
    finally:
        torch.set_num_threads(threads)
    for other in got[1:]:
        assert all(torch.equal(other[name], got[0][name]) for name in other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_leading_dimensions(backend, dtype):
    arguments = make(24, 40, 8, dtype)
    plain = results(ops.bottleneck, arguments, dy := torch.randn(24, 40).to(dtype))
    x = arguments["x"]
    views = {
        "transposed": x.T.contiguous().T,
        "every second column": x.repeat_interleave(2, 1)[:, ::2],
        "in wider rows": torch.cat([x, x], 1)[:, :40],
        "four dimensions": x.view(2, 3, 4, 40),
    }
    for name, view in views.items():
        other = {
            **arguments,
            "x": view,
            "residual": arguments["residual"].view(view.shape),
            "down_weight": arguments["down_weight"].T.contiguous().T,
            "up_weight": arguments["up_weight"].T.contiguous().T,
            "up_bias": arguments["up_bias"].repeat_interleave(2)[::2],
        }
        made = {
            n: v.detach().requires_grad_() if isinstance(v, torch.Tensor) else v
            for n, v in other.items()
        }
        y = ops.bottleneck(**made)
        assert y.shape == view.shape
        y.backward(dy.view(view.shape))
        assert_same(y.view(24, 40), plain["y"], name)
        for n in ("x", "down_weight", "up_weight", "up_bias"):
            assert_same(made[n].grad.reshape(plain[f"d_{n}"].shape), plain[f"d_{n}"], f"{name} {n}")
    vector = ops.bottleneck(**{**arguments, "x": x[3], "residual": arguments["residual"][3]})
    assert_same(vector, plain["y"][3], "a vector")


def test_any_subset_may_require_grad(backend):
    arguments = make(20, 30, 8, scaling=torch.randn(30), dropout_p=0.3)
    dy = torch.randn(20, 30)
    torch.manual_seed(2)
    full = results(ops.bottleneck, arguments, dy)
    for size in range(len(NAMES) + 1):
        for subset in itertools.combinations(NAMES, size):
            some = {
                n: v.clone().requires_grad_() if n in subset else v for n, v in arguments.items()
            }
            torch.manual_seed(2)
            y = ops.bottleneck(**some)
            assert y.requires_grad == bool(subset)
            if subset:
                y.backward(dy)
            for name in subset:
                assert_same(some[name].grad, full[f"d_{name}"], f"{name} of {subset}")


def test_gradcheck():
    for rows, residual in ((None, "same"), ([2, 0, 3], "other")):
        groups = () if rows is None else (3,)
        for activation in ACTIVATIONS:
            arguments = make(5, 6, 3, torch.float64, groups, torch.float64)
            tensors = [t.requires_grad_() for t in arguments.values()]
            tensors.append(torch.randn(6, dtype=torch.float64, requires_grad=True))

            def function(*tensors, options=(rows, residual, activation)):
                torch.manual_seed(1)
                *arguments, residual, scaling = tensors
                return ops.bottleneck(
                    *arguments,
                    scaling=scaling,
                    rows=options[0],
                    residual=tensors[0] if options[1] == "same" else residual,
                    activation=options[2],
                    dropout_p=0.3,
                )

            assert torch.autograd.gradcheck(function, tensors)


def test_dropout_is_of_the_branch_and_of_training_only(backend):
    arguments = make(30, 40, 8)
    assert torch.equal(ops.bottleneck(**arguments, dropout_p=1.0), arguments["residual"])
    off = ops.bottleneck(**arguments, dropout_p=0.5, training=False)
    assert torch.equal(off, ops.bottleneck(**arguments))
    state = torch.get_rng_state()
    first, second = (ops.bottleneck(**arguments, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(ops.bottleneck(**arguments, dropout_p=0.5), first)


def test_nan_spreads_over_its_row_only(backend):
    for activation in ACTIVATIONS:
        arguments = leaves(make(9, 40, 8, activation=activation))
        with torch.no_grad():
            arguments["x"][4, 7] = torch.nan
        y = ops.bottleneck(**arguments)
        assert y.isnan().all(1).tolist() == y.isnan().any(1).tolist() == [i == 4 for i in range(9)]


def test_float64_weights_beside_float32(backend):
    """No kernel takes them: the reference does, unless a kernel is asked for."""
    arguments = make(9, 40, 8)
    arguments["up_weight"] = arguments["up_weight"].double()
    if backend == "cpu":
        with pytest.raises(ValueError, match=r"no kernel for torch\.float64"):
            ops.bottleneck(**arguments)
        return
    torch.testing.assert_close(
        ops.bottleneck(**arguments), eager(**arguments), rtol=1e-5, atol=1e-5
    )
