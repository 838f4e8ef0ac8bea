"""multi_lora_linear: what it keeps, the arguments it takes, torch.library."""

import functools

import pytest
import torch
from multi_lora_cases import leaves, make, mapped, results
from tolerance import assert_same
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fusetune import ops
from fusetune.ops import _multi_lora_linear
from fusetune.ops._weight import flatten

ROWS = [1, -1, 0, 1]


@pytest.mark.parametrize("adapter_of", [None, ROWS], ids=["all", "by row"])
def test_only_x_s_and_the_seeds_are_saved(backend, adapter_of):
    """Of s only what the adapters' own rows need."""
    arguments = leaves(make((4, 5), 60, 70, [3, 8]))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ops.multi_lora_linear(**arguments, adapter_of=adapter_of, dropout_p=0.3)
    assert y.grad_fn.name().startswith("_MultiLora")
    own = {arguments["x"], *arguments["lora_A"], *arguments["lora_B"]}
    places = {tensor.data_ptr() for tensor in own}
    others = {(tuple(t.shape), t.dtype) for t in saved if t.data_ptr() not in places}
    size = 20 * 11 if adapter_of is None else 5 * 3 + 10 * 8
    assert {((2,), torch.int64), ((size,), torch.float32)} <= others
    # What is left are lora_bias's scaled copies, of parameters' size.
    assert all(shape in ((2,), (size,), (), (60,)) for shape, _ in others)


def test_a_tensor_scaling_is_a_number_that_is_differentiated(backend):
    a = make((4, 5), 9, 70, [3, 8])
    dy = torch.randn(4, 5, 9)
    expected = results(ops.multi_lora_linear, a, dy, adapter_of=ROWS)
    scaling = torch.tensor(a["scaling"][1], requires_grad=True)
    a["scaling"] = [a["scaling"][0], scaling]
    keep = functools.partial(ops.multi_lora_linear, adapter_of=ROWS)
    given = leaves(a) | {"scaling": a["scaling"]}
    y = keep(**given)
    y.backward(dy)
    assert_same(y.detach(), expected["y"])
    assert_same(given["lora_B"][1].grad, expected["dlora_B[1]"])
    # d y / d scaling_1 is the adapter's own part at scaling 1.
    zero, one = (mapped(a, torch.detach) | {"scaling": [1.5, float(s)]} for s in (0, 1))
    part = keep(**one) - keep(**zero)
    torch.testing.assert_close(scaling.grad, (part * dy).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scaling", [1.5, torch.tensor(1.5)])
def test_stacked_as_one_adapter(monkeypatch, scaling):
    """What GPUs do where all rows have all adapters and there is no dropout."""
    a = make((4, 5), 9, 70, [3, 8, 1]) | {"scaling": [scaling, 0.5, 2.0]}
    dy = torch.randn(4, 5, 9)
    assert ops.multi_lora_linear(**leaves(a)).grad_fn.name() == "_MultiLoraLinearBackward"
    expected = results(ops.multi_lora_linear, a, dy)
    module = __import__("sys").modules["fusetune.ops.multi_lora_linear"]
    assert module.stacks(torch.device("cuda"), False, False)
    assert not module.stacks(torch.device("cuda"), True, False)
    assert not module.stacks(torch.device("cuda"), False, True)
    monkeypatch.setattr(module, "stacks", lambda *_: True)
    assert ops.multi_lora_linear(**leaves(a)).grad_fn.name() == "_LoraLinearBackward"
    got = results(ops.multi_lora_linear, a, dy)
    for name, value in got.items():
        assert_same(value, expected[name], name)


def test_modes_that_watch_ops_see_ours(backend):
    arguments = make((4, 2), 9, 70, [3, 8])
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = ops.multi_lora_linear(**arguments, adapter_of=ROWS, dropout_p=0.5)
    assert isinstance(y, FakeTensor)
    assert y.shape == (4, 2, 9)


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"x": torch.zeros(4, 63)}, ValueError, r"x must have shape \[\.\.\., 64\], got \[4, 63\]"),
        ({"lora_A": []}, ValueError, "lora_B must have an entry for each of the 0 adapters"),
        ({"lora_B": [torch.zeros(8, 2)]}, ValueError, "lora_B must have .* 2 adapters .* got 1"),
        ({"scaling": 1.0}, TypeError, "scaling must have an entry for each adapter, got 1.0"),
        ({"scaling": [1.0, "1"]}, TypeError, "scaling must be numbers or 0-d tensors, got str"),
        ({"scaling": [1.0, torch.ones(2)]}, ValueError, r"scaling .* got shape \[2\]"),
        ({"dropout_p": [0.5]}, ValueError, "dropout_p must have an entry"),
        ({"dropout_p": [0.5, 1.5]}, ValueError, "adapter 1: dropout_p must be between 0 and 1"),
        ({"lora_bias": [None]}, ValueError, "lora_bias must have an entry"),
        ({"lora_bias": [None, torch.zeros(7)]}, ValueError, "adapter 1: lora_bias must have shape"),
        (
            {"lora_A": [torch.zeros(2, 64), torch.zeros(3, 63)]},
            ValueError,
            r"adapter 1: lora_A must have shape \[r, 64\]",
        ),
        (
            {"lora_B": [torch.zeros(8, 2), torch.zeros(8, 2)]},
            ValueError,
            r"adapter 1: lora_B must have shape \[8, 3\]",
        ),
        (
            {"lora_A": [torch.zeros(2, 64), torch.zeros(3, 64, dtype=torch.int8)]},
            TypeError,
            "adapter 1: lora_A must be .*int8",
        ),
        ({"weight": torch.zeros(8, 64, requires_grad=True)}, ValueError, "weight requires grad"),
        ({"adapter_of": [0, 1]}, ValueError, "adapter_of must have .* 4 rows of x, got 2"),
        ({"adapter_of": [0, 1, 2, 0]}, ValueError, "adapter_of .* from -1 to 1, got 2"),
        ({"adapter_of": [0, 1, "a", 0]}, ValueError, "adapter_of .* got 'a'"),
        (
            {"x": torch.zeros(64), "adapter_of": [0]},
            ValueError,
            r"x must have shape \[B, \.\.\., K",
        ),
    ],
)
def test_bad_arguments(arguments, error, names):
    good = make((4,), 8, 64, [2, 3], kind="dense")
    with pytest.raises(error, match=names):
        ops.multi_lora_linear(**(good | arguments))


# --- torch.library --------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "adapter_of"), [("dense", ROWS), ("fp4 nested", None)])
def test_opcheck(backend, kind, adapter_of):
    a = leaves(make((4, 3), 8, 70, [2, 5], kind=kind))
    biases = torch.randn(2, 8, requires_grad=True)
    settings = ([1.5, 0.5], adapter_of)
    dropouts = ([0.3, 0.0], torch.tensor([5, 6]))
    factors = (a["lora_A"], a["lora_B"])
    forward = (a["x"], *flatten(a["weight"]), *factors, *settings, a["bias"], biases, *dropouts)
    op = torch.ops.fusetune.multi_lora_linear.default
    torch.library.opcheck(op, (*forward, False), atol=1e-4, rtol=0)
    x, *factors = (
        a["x"].detach(),
        [t.detach() for t in a["lora_A"]],
        [t.detach() for t in a["lora_B"]],
    )
    s = op(*forward, False)[1].detach()
    weight = flatten(a["weight"])
    backward = (torch.randn(4, 3, 8), x, *weight, *factors, s, *settings, *dropouts)
    for need in ((True, [True, True], [True, True]), (False, [False, True], [False, False])):
        torch.library.opcheck(
            torch.ops.fusetune.multi_lora_linear_backward.default, (*backward, *need)
        )


@pytest.mark.parametrize(("kind", "adapter_of"), [("dense", ROWS), ("fp4 nested", None)])
def test_compiles_in_one_graph(fresh_compiler, backend, kind, adapter_of):
    compiled = torch.compile(
        ops.multi_lora_linear, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for tokens in (3, 7):
        arguments = make((4, tokens), 8, 70, [2, 5], kind=kind)
        dy = torch.randn(4, tokens, 8)
        given = {"adapter_of": adapter_of, "dropout_p": 0.3}
        torch.manual_seed(3)
        expected = results(ops.multi_lora_linear, arguments, dy, **given)
        torch.manual_seed(3)
        got = results(compiled, arguments, dy, **given)
        for name in expected:
            assert_same(got[name], expected[name], name)


def test_the_reference_runs_where_there_is_no_kernel():
    case = ops.Case("cuda", torch.float32)
    reasons = dict(_multi_lora_linear.OP.explain(case))
    assert "the tensors are on cuda" in reasons["cpu"]
    assert _multi_lora_linear.OP.select(case).name == "reference"
