"""lora_grouped_linear against the float64 reference, group by group."""

import itertools

import pytest
import torch
from tolerance import assert_close, one_thread

from fusetune import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("x", "lora_A", "lora_B")
SIZES = [(5, 0, 7), (0, 0, 0), (1, 1, 1), (20, 3, 0), (40, 0, 0)]


def ends_of(sizes):
    return list(itertools.accumulate(sizes))


def make(sizes, n=24, k=33, r=4, dtype=torch.float32, adapter=torch.float32, rest=0):
    g = len(sizes)
    return {
        "x": torch.randn(sum(sizes) + rest, k).to(dtype),
        "weight": torch.randn(g, n, k).to(dtype),
        "lora_A": torch.randn(g, r, k).to(adapter) / k**0.5,
        "lora_B": torch.randn(g, n, r).to(adapter) / r**0.5,
        "scaling": 1.5,
        "ends": ends_of(sizes),
    }


def eager(x, weight, lora_A, lora_B, scaling, ends):
    """What PEFT computes: the weights with their adapters in them."""
    folded = torch.baddbmm(weight, lora_B.to(weight.dtype), lora_A.to(weight.dtype), alpha=scaling)
    starts = [0, *ends[:-1]]
    parts = [x[a:b] @ w.t() for a, b, w in zip(starts, ends, folded, strict=True)]
    parts.append(x.new_zeros(len(x) - ends[-1], weight.shape[1]))
    return torch.cat(parts)


def results(function, arguments, dy):
    leaves = {n: arguments[n].detach().clone().requires_grad_() for n in NAMES}
    y = function(**(arguments | leaves))
    y.backward(dy)
    return {"y": y.detach(), **{f"d{n}": leaf.grad for n, leaf in leaves.items()}}


def mapped(arguments, function):
    return {n: function(v) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}


def check(arguments):
    dy = torch.randn(len(arguments["x"]), arguments["weight"].shape[1]).to(arguments["x"].dtype)
    got = results(ops.lora_grouped_linear, arguments, dy)
    exact = mapped(arguments, torch.Tensor.double)
    with one_thread(), ops.use_backend("reference"):
        true = results(ops.lora_grouped_linear, exact, dy.double())
        size = results(ops.lora_grouped_linear, mapped(exact, torch.abs), dy.double().abs())
        plain = results(eager, arguments, dy)
    for name in got:
        assert_close(name, got[name], true[name], plain[name], size[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_of_groups(backend, sizes, dtype):
    check(make(sizes, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 16])
def test_ranks_and_adapters_in_xs_dtype(backend, r, dtype):
    check(make((5, 0, 7, 2), r=r, dtype=dtype, adapter=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_stored_transposed_and_pefts_packing(backend, dtype):
    arguments = make((9, 0, 30), dtype=dtype)
    arguments["weight"] = arguments["weight"].transpose(1, 2).contiguous().transpose(1, 2)
    packed = arguments["lora_B"].permute(1, 2, 0).contiguous()  # [N, r, G]
    arguments["lora_B"] = packed.permute(2, 0, 1)
    check(arguments)


def test_rows_of_no_group_give_zeros(backend):
    arguments = make((3, 4), rest=5)
    got = results(ops.lora_grouped_linear, arguments, torch.ones(12, 24))
    assert got["y"][:7].all()
    assert not got["y"][7:].any()
    assert not got["dx"][7:].any()
    check(arguments)


def test_groups_without_rows_have_zero_gradients(backend):
    got = results(ops.lora_grouped_linear, make((5, 0, 7)), torch.ones(12, 24))
    assert not got["dlora_A"][1].any()
    assert not got["dlora_B"][1].any()
    assert got["dlora_A"][0].any()


def test_gradients_numerically():
    arguments = mapped(make((2, 0, 3), n=4, k=5, r=2), torch.Tensor.double)

    def function(*values):
        return ops.lora_grouped_linear(**(arguments | dict(zip(NAMES, values, strict=True))))

    assert torch.autograd.gradcheck(function, [arguments[n].requires_grad_() for n in NAMES])


@pytest.mark.parametrize("needed", NAMES)
def test_one_gradient_alone(backend, needed):
    arguments = make((5, 0, 7))
    wanted = arguments[needed].requires_grad_()
    y = ops.lora_grouped_linear(**arguments)
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), wanted),
        torch.autograd.grad(eager(**arguments).square().sum(), wanted),
        rtol=1e-4,
        atol=1e-4,
    )


def test_nothing_of_the_weights_size_is_kept(backend):
    arguments = make((5, 0, 7))
    arguments["lora_A"].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.lora_grouped_linear(**arguments)
    [weight] = [t for t in kept if t.shape == (3, 24, 33)]
    assert weight.data_ptr() == arguments["weight"].data_ptr()


def changed(**changes):
    return make((2, 3)) | changes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (changed(x=torch.ones(5, 9)), ValueError, r"x must have shape \[..., 33\]"),
        (changed(x=torch.ones(5)), ValueError, r"x must have 2 dimensions, got \[5\]"),
        (changed(weight=torch.ones(24, 33)), ValueError, "weight must have 3 dimensions"),
        (changed(lora_A=torch.ones(2, 0, 33)), ValueError, r"lora_A must have shape \[2, r, 33\]"),
        (changed(lora_B=torch.ones(2, 4, 24)), ValueError, "lora_B must have shape"),
        (changed(lora_B=torch.ones(2, 24, 4).int()), TypeError, "lora_B must be float16"),
        (changed(weight=torch.ones(2, 24, 33, requires_grad=True)), ValueError, "frozen"),
        (changed(ends=[2]), ValueError, r"ends must be 2 ascending numbers up to 5, got \[2\]"),
        (changed(ends=[3, 2]), ValueError, "ends must be 2 ascending"),
        (changed(ends=[2, 6]), ValueError, "up to 5"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.lora_grouped_linear(**arguments)
