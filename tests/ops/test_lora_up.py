"""lora_up against the float64 reference, and that it is in place."""

import pytest
import torch
from tolerance import assert_close, one_thread

from fusetune import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLACES = [(1,), (7,), (4, 5), (2, 3, 4), (0,)]
NAMES = ("y", "s", "lora_B", "bias")


def make(m, n, r, places, dtype=torch.float32, adapter=torch.float32):
    return {
        "y": torch.randn(m, n, *places).to(dtype),
        "s": torch.randn(m, r, *places).to(adapter),
        "lora_B": torch.randn(n, r).to(adapter) / r**0.5,
        "scaling": 1.5,
        "bias": torch.randn(n).to(adapter),
    }


def eager(y, s, lora_B, scaling, bias=None):
    """What PEFT computes."""
    added = torch.einsum("nr,mr...->mn...", lora_B, s)
    if bias is not None:
        added = added + bias.view(-1, *[1] * (y.dim() - 2))
    return (y + added * scaling).to(y.dtype)


def results(function, arguments, dy):
    leaves = {n: v.detach().clone().requires_grad_() for n, v in arguments.items() if n in NAMES}
    given = arguments | leaves
    out = function(**(given | {"y": given["y"] * 1}))  # a leaf cannot be written to
    out.backward(dy)
    return {"out": out.detach(), **{f"d{n}": leaf.grad for n, leaf in leaves.items()}}


def check(arguments):
    dy = torch.randn(arguments["y"].shape).to(arguments["y"].dtype)
    got = results(ops.lora_up, arguments, dy)
    exact = {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    sizes = {n: v.abs() if isinstance(v, torch.Tensor) else v for n, v in exact.items()}
    with one_thread(), ops.use_backend("reference"):
        true, size = results(ops.lora_up, exact, dy.double()), results(eager, sizes, dy.abs())
    plain = results(eager, arguments, dy)
    for name in got:
        assert_close(name, got[name], true[name], plain[name], size[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("places", PLACES, ids=str)
@pytest.mark.parametrize("m", [0, 1, 3])
def test_shapes(backend, m, places, dtype):
    check(make(m, 9, 4, places, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 16])
def test_ranks_and_adapters_in_ys_dtype(backend, r, dtype):
    arguments = make(2, 33, r, (5, 6), dtype, dtype)
    check(arguments)
    del arguments["bias"]
    check(arguments)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_it_is_in_place(backend, layout, grad):
    given = make(2, 8, 3, (4, 5))
    expected = eager(**given)
    y = given["y"].clone()
    if layout == "channels_last":
        y = y.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        y = torch.stack([y, y], -1)[..., 0].transpose(2, 3).contiguous().transpose(2, 3)
    given["s"].requires_grad_(grad)
    strides = y.stride()
    out = ops.lora_up(**(given | {"y": y}))
    assert out.data_ptr() == y.data_ptr()
    assert out.stride() == strides
    torch.testing.assert_close(out, expected)
    if grad:
        [got] = torch.autograd.grad(out.square().sum(), given["s"])
        [true] = torch.autograd.grad(eager(**given).square().sum(), given["s"])
        torch.testing.assert_close(got, true)


def test_gradients_numerically():
    arguments = {
        n: v.double() if isinstance(v, torch.Tensor) else v for n, v in make(2, 4, 2, (3,)).items()
    }

    def function(y, *rest):
        given = dict(zip(NAMES, (y * 1, *rest), strict=True))
        return ops.lora_up(**(arguments | given))

    assert torch.autograd.gradcheck(function, [arguments[n].requires_grad_() for n in NAMES])


def test_only_narrow_tensors_are_kept(backend):
    given = make(2, 8, 3, (4, 5))
    given["lora_B"].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.lora_up(**given)
    assert sorted(tuple(t.shape) for t in kept) == [(2, 3, 4, 5), (8, 3)]


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_equals_eager():
    compiled = torch.compile(ops.lora_up, backend="aot_eager", fullgraph=True)
    arguments, dy = make(2, 9, 4, (4, 5)), torch.randn(2, 9, 4, 5)
    torch.testing.assert_close(results(compiled, arguments, dy), results(eager, arguments, dy))


def changed(**changes):
    return make(2, 9, 4, (5,)) | changes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (changed(y=torch.ones(2, 9)), ValueError, r"y must have shape \[M, N, ...\], got \[2, 9\]"),
        (changed(y=torch.ones(2, 9, 5).int()), TypeError, "y must be float16"),
        (changed(s=torch.ones(2, 4, 6)), ValueError, r"s must have shape \(2, 4, 5\)"),
        (changed(lora_B=torch.ones(8, 4)), ValueError, r"lora_B must have shape \[9, r\]"),
        (changed(bias=torch.ones(8)), ValueError, r"bias must have shape \(9,\)"),
        (changed(s=torch.ones(2, 4, 5, device="meta")), ValueError, "s is on meta"),
    ],
)
def test_bad_arguments(arguments, error, message):
    before = arguments["y"].clone()
    with pytest.raises(error, match=message):
        ops.lora_up(**arguments)
    assert torch.equal(arguments["y"], before)
