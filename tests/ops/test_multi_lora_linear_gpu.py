"""multi_lora_linear on a GPU: against float64; constant launches, tables, the choice of the base
matmul, large offsets, rows that do not hear of others. Simulated."""

import pytest
import torch
from backends import simulated
from multi_lora_cases import check, leaves, make, mapped, named_tensors, results
from tolerance import assert_same

from fusetune import ops
from fusetune.ops import _gpu_choice, _multi_lora_linear
from fusetune.ops._weight import flatten

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def triton_sim():
    with simulated("triton-sim") as run:
        yield run


# Shape of x without K, N, K, ranks, adapter_of: one row each and many, ragged, blocks that are and
# are not neighbours, an adapter without a row, rows without an adapter, no row with one.
CASES = (
    ((8,), 48, 64, [1, 3, 16], [0, 1, 2, -1, 1, 0, 2, 1]),
    ((5, 7), 33, 130, [16, 3, 1], [1, 0, 1, -1, 1]),
    ((3, 2, 9), 97, 101, [5, 40], [1, 1, 0]),
    ((2, 150), 130, 101, [3, 20], [1, -1]),
    ((70, 3), 16, 72, [2, 1, 4, 3], [row % 5 - 1 for row in range(70)]),
    ((4, 5), 33, 70, [3, 2], [-1, -1, -1, -1]),
    ((19,), 40, 72, [4, 8, 1], None),
    ((3, 40), 33, 70, [1, 1], None),
    ((1,), 1, 1, [1, 2], [1]),
)
KINDS = (("nf4", BF16), ("dense", F32), ("fp4 nested", F16))


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_shapes(triton_sim, case, dropout):
    """The dtypes take turns: with and without dropout each shape has two of them."""
    *sizes, adapter_of = CASES[case]
    kind, dtype = KINDS[(case + dropout) % 3]
    dropout_p = [0.3, 0.0, 0.5, 0.1][: len(sizes[-1])] if dropout else 0.0
    check(make(*sizes, dtype, kind), adapter_of=adapter_of, dropout_p=dropout_p)
    names = {launch.kernel for launch in triton_sim.launches}
    if adapter_of is None or max(adapter_of) >= 0:
        assert {"_shrink", "_ds_db", "_da", "_linear"} <= names


@pytest.mark.parametrize("way", ["triton", "addmm"])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("adapter_of", [[1, 0, -1, 1], None], ids=["by row", "all"])
def test_every_way_gives_the_same(triton_sim, adapter_of, dtype, way):
    """Of more than 64 rows, so with the large tiles; of K and N that are multiples of 4, and in
    fp32 that are not."""
    n, k, dropout = (40, 72, [0.5, 0.25]) if dtype == BF16 else (33, 70, 0.0)
    with _gpu_choice.use_way(way):
        check(make((4, 20), n, k, [20, 3], dtype), adapter_of=adapter_of, dropout_p=dropout)


@pytest.mark.parametrize("adapter", [F16, BF16, torch.float64])
def test_adapters_in_other_dtypes(triton_sim, adapter):
    rows = [1, 0, -1, 2, 1, 1]
    dtype = F32 if adapter == torch.float64 else adapter
    check(make((6, 5), 33, 70, [4, 2, 9], dtype, adapter=adapter), adapter_of=rows)


def test_adapters_of_different_dtypes(triton_sim):
    a, dy, rows = make((4, 2), 33, 70, [4, 2]), torch.ones(4, 2, 33), [1, 0, 1, -1]
    a["lora_A"][1], a["lora_B"][0] = a["lora_A"][1].half(), a["lora_B"][0].bfloat16()
    wide = mapped(a, torch.Tensor.float)
    got, expected = (
        results(ops.multi_lora_linear, given, dy, adapter_of=rows) for given in (a, wide)
    )
    assert (got["dlora_A[1]"].dtype, got["dlora_B[0]"].dtype) == (F16, BF16)
    for name, value in got.items():
        assert_same(value, expected[name].to(value.dtype), name)


@pytest.mark.parametrize("adapter_of", [[0, 1, 0], None], ids=["by row", "all"])
def test_any_layout_of_the_inputs(triton_sim, adapter_of):
    a = make((3, 4), 33, 70, [4, 2], kind="dense")
    expected = results(ops.multi_lora_linear, a, torch.ones(3, 4, 33), adapter_of=adapter_of)
    a["x"] = a["x"].transpose(0, 1).contiguous().transpose(0, 1)
    a["lora_A"] = [t.T.contiguous().T for t in a["lora_A"]]
    a["lora_B"] = [torch.cat([t, t], 1)[:, : t.shape[1]] for t in a["lora_B"]]
    a["weight"] = a["weight"].T.contiguous().T
    got = results(ops.multi_lora_linear, a, torch.ones(1).expand(3, 4, 33), adapter_of=adapter_of)
    for name, value in got.items():
        assert_same(value, expected[name], name)


@pytest.mark.parametrize("trained", [["x"], ["lora_B[1]"], ["lora_A[1]", "lora_B[0]"], ["bias"]])
def test_frozen_parts_get_no_gradient(triton_sim, trained):
    a, dy = make((3, 4), 33, 70, [4, 2]), torch.ones(3, 4, 33)
    expected = results(ops.multi_lora_linear, a, dy, adapter_of=[1, 0, 1])
    given = leaves(a)
    tensors = named_tensors(given)
    for name in set(tensors) - set(trained):
        tensors[name].requires_grad_(False)
    ops.multi_lora_linear(**given, adapter_of=[1, 0, 1]).backward(dy)
    for name, tensor in tensors.items():
        assert (tensor.grad is not None) == (name in trained), name
        if tensor.grad is not None:
            assert_same(tensor.grad, expected[f"d{name}"], name)


# --- launches -------------------------------------------------------------------------------------


def launched(run, adapters, tokens, **options):
    """The kernels of a step of 16 rows, by row over so many adapters."""
    a = make((16, tokens), 64, 128, [4] * adapters, BF16, adapter=BF16)
    a = leaves(a | {"scaling": [2.0] * adapters, "lora_bias": None})
    run.launches.clear()
    y = ops.multi_lora_linear(**a, adapter_of=[row % adapters for row in range(16)], **options)
    forward = [launch.kernel for launch in run.launches]
    run.launches.clear()
    y.sum().backward()
    return forward, [launch.kernel for launch in run.launches]


@pytest.mark.parametrize("tokens", [1, 20])
def test_as_many_launches_for_many_adapters_as_for_two(triton_sim, tokens):
    for dropout in (0.0, 0.3)[tokens > 1 :]:
        forward, backward = launched(triton_sim, 2, tokens, dropout_p=dropout)
        assert [forward.count(name) for name in ("_shrink", "_linear")] == [1, 1]
        assert [backward.count(name) for name in ("_ds_db", "_da", "_linear")] == [1, 1, 1]
        assert forward.count("_dequantize") == backward.count("_dequantize") == 1
        assert len(forward) <= 4  # one that adds the parts of s
        assert len(backward) <= 7  # ... of ds, dB and dA
        many = launched(triton_sim, 16, tokens, dropout_p=dropout)
        # More programs: fewer parts to add.
        for few, names in zip((forward, backward), many, strict=True):
            assert set(names) <= set(few)
            assert all(names.count(name) <= few.count(name) for name in few)


def test_the_host_does_not_wait(triton_sim, monkeypatch):
    """From the second step on: nothing is read from the device, and no table is made."""
    launched(triton_sim, 4, 2, dropout_p=0.3)

    def waits(*_, **__):
        raise AssertionError("the host waits for the device")

    arguments = make((16, 2), 64, 128, [4] * 4, BF16, adapter=BF16)
    arguments = leaves(arguments | {"scaling": [2.0] * 4, "lora_bias": None})
    rows = [row % 4 for row in range(16)]
    monkeypatch.setattr(torch, "tensor", waits)
    for name in ("item", "tolist", "__int__", "__float__", "__bool__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    ops.multi_lora_linear(**arguments, adapter_of=rows, dropout_p=0.3).sum().backward()
    monkeypatch.undo()
    assert all(a.grad is not None for a in arguments["lora_A"])


def test_x_is_read_once_by_row(triton_sim):
    """Each row by its own adapter's program alone: as much as one adapter reads, and every A."""
    from fusetune._triton._adapters import make_plan
    from fusetune._triton.multi_lora_linear import launch_multi_shrink

    x = torch.randn(256, 512).to(BF16)
    every = (((0, 1.0),) * 4, torch.device("cpu"))
    plan = make_plan((0, 1, 2, 3), (16,) * 4, (1.0,) * 4, *every)
    launch_multi_shrink(x, torch.zeros(4 * 16 * 512, dtype=BF16), plan)
    loaded = 32 * triton_sim.launches[0].counts.global_load_sectors
    tables = 32 * 64 * len(triton_sim.launches[0].grid) * 4 * 8
    assert x.nbytes + 4 * 16 * 512 * 2 <= loaded <= x.nbytes + 4 * 16 * 512 * 2 + tables


# --- what one row or adapter does to others -------------------------------------------------------


@pytest.mark.parametrize("way", ["triton", "addmm"])
def test_rows_do_not_hear_of_other_adapters(triton_sim, way):
    """An adapter that diverged, with NaN in it, in the same tiles as others."""
    a, dy, rows = make((4, 3), 33, 70, [4, 2, 3], BF16), torch.ones(4, 3, 33).to(BF16), [0, 1, 2, 0]
    with _gpu_choice.use_way(way):
        expected = results(ops.multi_lora_linear, a, dy, adapter_of=rows)
        a["lora_A"][1], a["lora_B"][1] = a["lora_A"][1] * torch.nan, a["lora_B"][1] * torch.inf
        got = results(ops.multi_lora_linear, a, dy, adapter_of=rows)
    for name in ("y", "dx"):
        assert got[name][1].isnan().all()
        assert torch.equal(got[name][[0, 2, 3]], expected[name][[0, 2, 3]])
    for i in (0, 2):
        for name in (f"dlora_A[{i}]", f"dlora_B[{i}]"):
            assert torch.equal(got[name], expected[name])


@pytest.mark.parametrize("adapter_of", [[1, 0, 1, -1, 2, 0], None], ids=["by row", "all"])
def test_results_do_not_change_from_run_to_run(triton_sim, adapter_of):
    arguments, dy = make((6, 50), 72, 260, [8, 3, 1], BF16), torch.randn(6, 50, 72).to(BF16)

    def run():
        torch.manual_seed(2)
        options = {"adapter_of": adapter_of, "dropout_p": [0.2, 0.0, 0.5]}
        return results(ops.multi_lora_linear, arguments, dy, **options)

    first, second = run(), run()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    opcodes = {op for launch in triton_sim.launches for op in launch.counts.instructions}
    assert not [op for op in opcodes if op.startswith(("atom", "red."))]


def test_offsets_above_2_to_the_31(triton_sim):
    """Two rows of x, and of dy, so far apart that an int32 offset would wrap."""
    stride, k, n = 2**31 + 64, 64, 48
    far = torch.empty(0, dtype=torch.uint8)
    far.set_(torch.UntypedStorage(2 * (stride + k + n)))  # untouched pages take no memory
    far = far.view(BF16)
    x, dy = far.as_strided((2, k), (stride, 1)), far[k:].as_strided((2, n), (stride, 1))
    near = {"x": torch.randn(2, k).to(BF16), "dy": torch.randn(2, n).to(BF16)}
    x.copy_(near["x"])
    dy.copy_(near["dy"])
    arguments = make((2,), n, k, [4, 2], BF16)

    def run(x, dy):
        inputs = leaves(arguments) | {"x": x}
        torch.manual_seed(1)
        y = ops.multi_lora_linear(**inputs, adapter_of=[1, 0], dropout_p=0.3)
        y.backward(dy)
        return y.detach(), *(t.grad for t in (*inputs["lora_A"], *inputs["lora_B"]))

    for got, expected in zip(run(x, dy), run(**near), strict=True):
        assert torch.equal(got, expected)


# --- who carries it out ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "k", "adapter_of"),
    [((3, 0), 64, [0, 1, -1]), ((0, 4), 64, []), ((3, 2), 0, [0, 1, -1]), ((0, 4), 64, None)],
)
def test_empty_shapes(triton_sim, shape, k, adapter_of):
    a = make(shape, 9, k, [4, 2], kind="dense")
    if k == 0:
        a["lora_A"] = [torch.zeros(4, 0), torch.zeros(2, 0)]
    dy = torch.randn(*shape, 9)
    got = results(ops.multi_lora_linear, a, dy, adapter_of=adapter_of, dropout_p=0.3)
    assert not triton_sim.launches
    assert got["y"].shape == (*shape, 9)
    assert not any(value.isnan().any() for value in got.values())


@pytest.mark.parametrize(
    ("shape", "dtype", "kind", "adapter_of"),
    [
        ((5, 7), F16, "nf4", [1, 0, 1, -1, 1]),
        ((3, 40), F16, "dense", None),
        ((5, 7), F32, "nf4", [1, 0, 1, -1, 1]),
    ],
)
def test_turing(shape, dtype, kind, adapter_of):
    """Narrow products by fp32 FMA; a base product in 16 bits is never Triton's."""
    with simulated("triton-sim", 75) as run:
        check(make(shape, 33, 70, [16, 3], dtype, kind), adapter_of=adapter_of, dropout_p=[0.3, 0])
    opcodes = {op.split(".")[0] for launch in run.launches for op in launch.counts.instructions}
    assert {"_shrink", "_ds_db", "_da", "_linear"} <= {launch.kernel for launch in run.launches}
    assert "mma" not in opcodes


def test_the_cuda_kernels_serve_few_rows_also_beside_triton():
    """The base product is theirs; the adapters' parts are added to it in one launch."""
    with simulated("cuda-sim") as cuda, simulated("triton-sim") as run, ops.use_backend("auto"):
        check(make((3, 2), 24, 64, [4, 2], BF16), adapter_of=[1, -1, 0], dropout_p=0.3)
        assert {launch.kernel for launch in cuda.launches}
    assert [launch.kernel for launch in run.launches].count("_linear") == 2


def test_reasons():
    op = _multi_lora_linear.OP
    with simulated("triton-sim"), ops.use_backend("auto"):
        assert op.select(ops.Case("cpu", BF16)).name == "triton"
        assert op.select(ops.Case("cpu", torch.float64)).name == "reference"
        assert "float64" in dict(op.explain(ops.Case("cpu", torch.float64)))["triton"]
        assert "dense weight" in dict(op.explain(ops.Case("cpu", BF16, F32)))["triton"]
    assert dict(op.explain(ops.Case("cpu", BF16)))["triton"] == "the tensors are on cpu"


def test_few_rows_take_triton_and_many_the_vendors_matmul():
    every = dict.fromkeys(("triton", "addmm"))
    for m, way in ((64, "triton"), (65, "addmm")):
        problem = _gpu_choice.Problem("y", m, 64, 64, 8, BF16, torch.device("cpu"), several=True)
        assert _gpu_choice.default(problem, every) == way
        assert "of several" in problem._replace(device=torch.device("cpu")).key()


def test_tables_are_kept():
    from fusetune._triton._adapters import make_plan

    given = ((1, -1, 1), (2, 3), (1.0, 0.5), ((0, 1.0),) * 2, torch.device("cpu"))
    plan = make_plan(*given)
    assert make_plan(*given) is plan
    assert plan.served.tolist() == [0, 2]
    assert plan.places.tolist() == [[-1, -1, -1], [0, -1, 3]]
    assert (plan.most, plan.size) == (2, 6)
    assert plan.records[1, :5].tolist() == [3, 2, 2, 0, 0]
    assert plan.records[:, 7].view(F32).tolist() == [1.0, 0.5]


def test_opcheck(triton_sim):
    a = leaves(make((4, 3), 8, 70, [2, 5], kind="dense"))
    biases = torch.randn(2, 8, requires_grad=True)
    settings, dropouts = ([1.5, 0.5], [1, -1, 0, 1]), ([0.3, 0.0], torch.tensor([5, 6]))
    factors = (a["lora_A"], a["lora_B"])
    forward = (a["x"], *flatten(a["weight"]), *factors, *settings, a["bias"], biases, *dropouts)
    op = torch.ops.fusetune.multi_lora_linear.default
    torch.library.opcheck(op, (*forward, False), atol=1e-4, rtol=0)
    s = op(*forward, False)[1].detach()
    x, *factors = a["x"].detach(), *([t.detach() for t in factor] for factor in factors)
    backward = (torch.randn(4, 3, 8), x, *flatten(a["weight"]), *factors, s, *settings, *dropouts)
    for need in ((True, [True, True], [True, True]), (False, [False, True], [False, False])):
        torch.library.opcheck(
            torch.ops.fusetune.multi_lora_linear_backward.default, (*backward, *need)
        )
