"""lora_embedding against the float64 reference, on every backend, and its interface."""

import pytest
import torch
from tolerance import assert_close, one_thread

from fusetune import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(), (1,), (7,), (2, 9), (3, 1, 4), (0,), (2, 0), (300,)]


def make(shape, dtype=torch.float32, adapter=torch.float32, v=50, h=33, r=5):
    return {
        "input_ids": torch.randint(0, v, shape),
        "weight": torch.randn(v, h).to(dtype),
        "lora_A": torch.randn(r, v).to(adapter),
        "lora_B": torch.randn(h, r).to(adapter) / r**0.5,
        "scaling": 1.5,
    }


def eager(input_ids, weight, lora_A, lora_B, scaling, scale=1.0, padding_idx=None):
    """What PEFT computes."""
    embedding = torch.nn.functional.embedding
    low = embedding(input_ids, lora_A.T, padding_idx=padding_idx)
    y = embedding(input_ids, weight) * torch.tensor(scale, dtype=weight.dtype)
    return (y + (low @ lora_B.T) * scaling * scale).to(weight.dtype)


def results(function, arguments, dy, **options):
    leaves = {n: arguments[n].detach().clone().requires_grad_() for n in ("lora_A", "lora_B")}
    y = function(**(arguments | leaves), **options)
    y.backward(dy)
    return {"y": y.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def to(arguments, function):
    return {
        name: function(value)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }


def check(arguments, **options):
    shape = (*arguments["input_ids"].shape, arguments["weight"].shape[1])
    dy = torch.randn(shape).to(arguments["weight"].dtype)
    got = results(ops.lora_embedding, arguments, dy, **options)
    exact = to(arguments, torch.Tensor.double)
    with one_thread(), ops.use_backend("reference"):
        true = results(ops.lora_embedding, exact, dy.double(), **options)
        size = results(ops.lora_embedding, to(exact, torch.abs), dy.double().abs(), **options)
        plain = results(eager, arguments, dy, **options)
    for name in got:
        assert_close(name, got[name], true[name], plain[name], size[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend, shape, dtype):
    check(make(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 8, 64])
def test_ranks_and_adapters_in_the_tables_dtype(backend, r, dtype):
    check(make((4, 11), dtype, dtype, r=r))


@pytest.mark.parametrize("backend", ["triton-sim", "triton"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_gpus(backend, dtype):
    check(make((2, 9), dtype, h=48, r=8), padding_idx=3)


@pytest.mark.parametrize("options", [{"scale": 3.25}, {"padding_idx": 3}, {"padding_idx": -1}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(backend, options, dtype):
    arguments = make((4, 40), dtype)  # token 3 and the last one occur
    assert {3, 49} <= set(arguments["input_ids"].flatten().tolist())
    check(arguments, **options)


def test_the_padding_token_has_no_gradient(backend):
    arguments = make((4, 40))
    grads = results(ops.lora_embedding, arguments, torch.ones(4, 40, 33), padding_idx=3)
    plain = results(ops.lora_embedding, arguments, torch.ones(4, 40, 33))
    assert not grads["dlora_A"][:, 3].any()
    assert plain["dlora_A"][:, 3].any()


def test_gradients_numerically():
    arguments = to(make((6,), v=9, h=4, r=2), torch.Tensor.double)
    names = ("lora_A", "lora_B", "scaling")
    arguments["scaling"] = torch.tensor(0.7, dtype=torch.float64)

    def function(*values):
        return ops.lora_embedding(**(arguments | dict(zip(names, values, strict=True))), scale=2.0)

    leaves = [arguments[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, leaves)


def test_a_repeated_token_sums_in_a_fixed_order(backend):
    arguments, dy = make((2000,), v=3), torch.randn(2000, 33)
    first, again = (results(ops.lora_embedding, arguments, dy) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, again[name])


def test_strides_and_int32(backend):
    arguments = make((4, 6))
    expected = results(ops.lora_embedding, arguments, torch.ones(4, 6, 33))
    strided = {
        name: value.T.contiguous().T if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    strided["input_ids"] = strided["input_ids"].int()
    got = results(ops.lora_embedding, strided, torch.ones(()).expand(4, 6, 33))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("needed", ["lora_A", "lora_B"])
def test_one_gradient_alone(backend, needed):
    arguments = make((3, 20))
    wanted = arguments[needed].requires_grad_()
    y = ops.lora_embedding(**arguments)
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), wanted),
        torch.autograd.grad(eager(**arguments).square().sum(), wanted),
    )


def test_only_tokens_and_narrow_tensors_are_kept(backend):
    arguments = make((8, 50))
    arguments["lora_A"].requires_grad_(), arguments["lora_B"].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.lora_embedding(**arguments)
    assert sorted(tuple(t.shape) for t in kept) == [(8, 50), (33, 5), (400, 5)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_opcheck(dtype):
    given = make((4, 6), dtype)
    a, b = given["lora_A"].requires_grad_(), given["lora_B"].requires_grad_()
    arguments = (given["input_ids"], given["weight"], a, b, 1.5, 1.0, -1)
    torch.library.opcheck(torch.ops.fusetune.lora_embedding.default, arguments)
    h = torch.randn(24, 5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    backward = (torch.randn(4, 6, 33).to(dtype), given["input_ids"], h, b.detach(), 50, 1.5, -1)
    for need in ((True, True), (True, False), (False, True)):
        op = torch.ops.fusetune.lora_embedding_backward.default
        torch.library.opcheck(op, (*backward, *need))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_equals_eager():
    compiled = torch.compile(ops.lora_embedding, backend="aot_eager", fullgraph=True)
    for shape in ((4, 6), (3, 5)):
        arguments, dy = make(shape), torch.randn(*shape, 33)
        got = results(compiled, arguments, dy, padding_idx=2)
        torch.testing.assert_close(got, results(ops.lora_embedding, arguments, dy, padding_idx=2))


def changed(**changes):
    return make((3,)) | changes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (changed(input_ids=torch.ones(3)), TypeError, "input_ids must be an int64 or int32 tensor"),
        (changed(input_ids=[1]), TypeError, "got list"),
        (changed(weight=torch.ones(50)), ValueError, r"weight must be a matrix, got shape \[50\]"),
        (changed(lora_A=torch.ones(5, 9)), ValueError, r"lora_A must have shape \[r, 50\]"),
        (changed(lora_A=torch.ones(0, 50)), ValueError, "with r > 0"),
        (changed(lora_B=torch.ones(5, 33)), ValueError, r"lora_B must have shape \(33, 5\)"),
        (changed(lora_B=torch.ones(33, 5).int()), TypeError, "lora_B must be float16"),
        (changed(scaling="1"), TypeError, "scaling must be a number or a 0-d tensor, got str"),
        (changed(padding_idx=50), ValueError, r"padding_idx must be in \[-50, 50\), got 50"),
        (changed(weight=torch.ones(50, 33, requires_grad=True)), ValueError, "treated as frozen"),
        (changed(lora_A=torch.ones(5, 50, device="meta")), ValueError, "lora_A is on meta"),
        (changed(input_ids=torch.tensor([50])), IndexError, "out of range"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.lora_embedding(**arguments)
