"""bottleneck: what it keeps and allocates, the arguments it takes, torch.library."""

import pytest
import torch
from bottleneck_cases import DTYPES, leaves, make, results
from tolerance import assert_same

from fusetune import _native, ops


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_x_z_and_the_seed_are_saved(backend, dtype):
    arguments = leaves(make(50, 60, 7, dtype))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.bottleneck(**arguments, dropout_p=0.3)
    own = {arguments[name].data_ptr() for name in ("x", "down_weight", "up_weight")}
    others = [(tuple(t.shape), t.dtype) for t in saved if t.data_ptr() not in own]
    assert sorted(others) == [((1,), torch.int64), ((50, 7), dtype)]
    assert len(saved) == len(others) + len(own)


def allocated(function):
    """The result of a function, and the bytes of every allocation of torch's that it made."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = function()
    events = profile.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return result, [size for size in sizes if size > 0]


@pytest.mark.skipif(_native.C is None, reason="no native module")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cpu_backend_allocates_its_results_and_nothing_else(dtype):
    m, h, d = 64, 96, 8
    arguments = leaves(make(m, h, d, dtype, weights=dtype, residual="same"))
    arguments.update(down_bias=None, up_bias=None)
    with ops.use_backend("cpu"):
        ops.bottleneck(**arguments)
        size = dtype.itemsize
        y, sizes = allocated(lambda: ops.bottleneck(**arguments, dropout_p=0.3))
        assert sorted(sizes) == sorted([8, m * d * size, m * h * size])
        dy = torch.ones_like(y)
        _, sizes = allocated(lambda: y.backward(dy))
        assert sorted(sizes) == sorted([d * h * size, h * d * size, m * h * size])


def test_a_residual_that_is_x_gets_one_gradient(backend):
    """The same as two tensors of the same values, their gradients added."""
    arguments, dy = make(20, 30, 6), torch.randn(20, 30)
    arguments["residual"] = arguments["x"]
    two = results(ops.bottleneck, arguments, dy)
    one = results(ops.bottleneck, {**arguments, "residual": "same"}, dy)
    assert torch.equal(one["y"], two["y"])
    assert_same(one["d_x"], two["d_x"] + two["d_residual"])


def test_x_changed_in_place_is_noticed():
    arguments = leaves(make(5, 9, 2))
    y = ops.bottleneck(**arguments)
    with torch.no_grad():
        arguments["x"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_differentiating_twice_is_refused(backend):
    arguments = leaves(make(3, 9, 2))
    y = ops.bottleneck(**arguments).square().sum()
    (dx,) = torch.autograd.grad(y, arguments["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_opcheck(dtype):
    x, down, down_bias, up, up_bias, residual = leaves(
        make(6, 20, 4, dtype, (2,), torch.float64 if dtype == torch.float64 else torch.float32)
    ).values()
    seed = torch.tensor([3])
    for arguments in (
        (x, down, down_bias, up, up_bias, [4, 2], "gelu", residual, False, 0.3, seed),
        (x, down[0].detach(), None, up[1].detach(), None, None, "relu", None, True, 0.0, None),
    ):
        torch.library.opcheck(torch.ops.fusetune.bottleneck.default, arguments)
    y, z = torch.ops.fusetune.bottleneck(*arguments)
    arguments = (y.detach(), x.detach(), down[0].detach(), up[1].detach(), z.detach())
    for need in ([True] * 5, [False, True, False, False, True]):
        settings = (None, "relu", True, 0.0, None, need)
        torch.library.opcheck(
            torch.ops.fusetune.bottleneck_backward.default, (*arguments, *settings)
        )


def test_compiled(fresh_compiler):
    arguments = make(30, 40, 8, scaling=torch.randn(40), activation="gelu")
    dy = torch.randn(30, 40)
    compiled = torch.compile(ops.bottleneck, fullgraph=True, backend="aot_eager")
    got = results(compiled, arguments, dy)
    for name, value in results(ops.bottleneck, arguments, dy).items():
        assert_same(got[name], value, name)


BAD = [
    ({"x": torch.ones(4, 6, dtype=torch.int64)}, TypeError, "x must be float16"),
    ({"x": torch.randn(4, 0)}, ValueError, r"x must have shape \[\.\.\., H\] with H > 0"),
    ({"x": torch.randn(4, 7)}, ValueError, "down_weight must have shape"),
    ({"down_weight": torch.randn(0, 6)}, ValueError, r"shape \[d, 6\] with d > 0"),
    ({"down_weight": torch.randn(1, 3, 6)}, ValueError, r"shape \[d, 6\]"),
    ({"down_weight": None}, TypeError, "down_weight must be a tensor"),
    ({"up_weight": torch.randn(3, 6)}, ValueError, r"up_weight must have shape \(6, 3\)"),
    ({"down_bias": torch.randn(6)}, ValueError, r"down_bias must have shape \(3,\)"),
    ({"up_bias": torch.randn(6).long()}, TypeError, "up_bias must be float16"),
    ({"residual": torch.randn(1, 6)}, ValueError, r"residual must have shape \(4, 6\)"),
    ({"residual": torch.randn(4, 6, device="meta")}, ValueError, "residual is on meta"),
    ({"activation": "swish"}, ValueError, "activation must be one of .* got 'swish'"),
    ({"scaling": "learned"}, TypeError, "scaling must be a number or a tensor, got str"),
    ({"scaling": torch.randn(3)}, ValueError, "scaling must have one of the shapes"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1"),
    ({"rows": [2, 2]}, ValueError, r"down_weight must have shape \[2, d, 6\]"),
    ({"rows": [2, 1]}, ValueError, "rows must sum to the 4 rows of x"),
    ({"rows": [5, -1]}, ValueError, "rows must be numbers of rows, none of them negative"),
    ({"rows": []}, ValueError, "rows must be numbers of rows"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda value: str(value)[:24])
def test_bad_arguments(backend, change, error, message):
    with pytest.raises(error, match=message):
        ops.bottleneck(**{**make(4, 6, 3), **change})
