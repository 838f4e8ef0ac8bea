"""lora_linear_group against separate layers in float64, and what it shares."""

import pytest
import torch
from backends import HOST, TRITON, simulated
from group_cases import check, gradients, grouped, make, results, separate
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_cases import DTYPES
from tolerance import assert_same
from torch.utils.checkpoint import checkpoint

from fusetune import _native, ops

F32, F16, BF16 = DTYPES
QKV = ((36, 8, 0.3), (12, 3, 0.0), (12, 16, 0.1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kinds", [("dense",), ("nf4",), ("nf4", "fp4 nested")], ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (9, 577), (70, 101), (130, 128)], ids=str)
def test_mixed_ranks_dropouts_and_biases(backend, shape, kinds, dtype):
    check(*make(*shape, QKV, dtype, kinds))


@pytest.mark.skipif(_native.C is None, reason="no native module")
@pytest.mark.parametrize("isa", _native.C.available_isas() if _native.C else [])
def test_every_instruction_set(isa):
    before = _native.C.isa()
    ops.set_isa(isa)
    try:
        with ops.use_backend("cpu"):
            for m, k in ((5, 70), (80, 150)):
                for dtype in DTYPES:
                    check(*make(m, k, QKV, dtype))
    finally:
        ops.set_isa(before)


@pytest.mark.parametrize("backend", TRITON, indirect=True)
@pytest.mark.parametrize(
    ("dtype", "kinds", "adapter", "sizes"),
    [
        (BF16, ("dense",), BF16, ((40, 16, 0.0), (24, 16, 0.0), (24, 8, 0.0))),
        (F16, ("nf4",), F32, ((40, 16, 0.3), (24, 3, 0.3), (24, 8, 0.3))),
        (F32, ("dense",), F32, ((40, 5, 0.3), (24, 5, 0.0))),
        (BF16, ("nf4", "fp4 nested"), F32, ((8, 4, 0.1),) * 5),
    ],
    ids=lambda value: None if isinstance(value, tuple) else str(value),
)
def test_on_gpus(backend, dtype, kinds, adapter, sizes):
    check(*make(19, 40, sizes, dtype, kinds, adapter))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_group(data):
    size = st.tuples(st.integers(1, 40), st.integers(1, 20), st.sampled_from((0.0, 0.4)))
    sizes = data.draw(st.lists(size, min_size=1, max_size=4))
    m, k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 90))
    torch.manual_seed(m + k)
    check(
        *make(
            m,
            k,
            sizes,
            data.draw(st.sampled_from(DTYPES)),
            data.draw(st.sampled_from([("dense",), ("nf4",)])),
        )
    )


@pytest.mark.parametrize("kinds", [("dense",), ("nf4",)], ids=str)
def test_masks_are_those_of_separate_layers(backend, kinds):
    """The seeds come from torch's generator in the same order."""
    x, group = make(30, 64, QKV, kinds=kinds)
    dys = gradients(x, group)
    one, other = (results(function, x, group, dys) for function in (grouped, separate))
    for name in one:
        assert_same(one[name], other[name], name)


def test_three_dimensions_strides_and_a_tensor_scaling(backend):
    x, group = make(12, 40, QKV, biases=False)
    group[0]["scaling"] = torch.tensor(1.5)
    x = x.view(3, 4, 40).transpose(0, 1)
    dys = [dy.transpose(-1, -2).contiguous().transpose(-1, -2) for dy in gradients(x, group)]
    one, other = (results(function, x, group, dys) for function in (grouped, separate))
    for name in one:
        assert one[name].shape == other[name].shape
        assert_same(one[name], other[name], name)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_empty(backend, shape):
    x, group = make(1, 8, QKV, biases=False)
    x = torch.empty(*shape)
    found = results(grouped, x, group, gradients(x, group))
    assert found["y1"].shape == (*shape[:-1], 12)
    assert all(not found[name].any() for name in found if name.startswith("dlora"))


def test_outputs_that_are_not_used(backend):
    x, group = make(20, 64, QKV)
    dys = gradients(x, group)
    for unused in ((0,), (1, 2)):
        some = [None if i in unused else dy for i, dy in enumerate(dys)]
        one, other = (results(function, x, group, some) for function in (grouped, separate))
        for name, value in other.items():
            if value is None:
                assert one[name] is None, name
            else:
                assert_same(one[name], value, name)


@pytest.mark.parametrize("needed", ["x", "lora_A", "lora_B", "bias"])
def test_only_what_is_needed(backend, needed):
    x, group = make(20, 64, QKV)
    dys = gradients(x, group)
    full = results(separate, x, group, dys)
    torch.manual_seed(3)
    leaf = (x if needed == "x" else group[0][needed]).requires_grad_()
    torch.autograd.backward(grouped(x, group), dys)
    assert_same(leaf.grad, full["dx" if needed == "x" else f"d{needed}0"])


def test_nothing_is_kept_without_gradients(backend):
    x, group = make(20, 64, QKV)
    with torch.no_grad():
        assert all(y.grad_fn is None for y in grouped(x.requires_grad_(), group))


def test_results_may_be_changed_in_place(backend):
    x, group = make(12, 40, QKV)
    ys = grouped(x.view(3, 4, 40).requires_grad_(), group)
    for y in ys:
        y.mul_(2)
    torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])


def test_one_node_and_one_x(backend):
    x, group = make(20, 64, QKV)
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ys = grouped(x, group)
    assert len({y.grad_fn for y in ys}) == 1
    assert [tensor.data_ptr() for tensor in kept].count(x.data_ptr()) == 1
    assert not [t for t in kept if t.shape == x.shape and t.data_ptr() != x.data_ptr()]


def test_a_changed_x_is_noticed(backend):
    x, group = make(20, 64, QKV)
    x = x.requires_grad_() * 1
    ys = grouped(x, group)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(ys, gradients(x, group))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_masks(backend, reentrant):
    x, group = make(20, 64, QKV)

    def run(x, group):
        ys = checkpoint(lambda x: tuple(grouped(x, group)), x, use_reentrant=reentrant)
        return list(ys)

    dys = gradients(x, group)
    one, other = (results(function, x, group, dys) for function in (run, separate))
    for name in one:
        assert_same(one[name], other[name], name)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_it_is_separate_layers():
    x, group = make(8, 32, ((12, 4, 0.0), (8, 2, 0.0)), kinds=("dense",))
    compiled = torch.compile(grouped, backend="aot_eager", fullgraph=True)
    dys = gradients(x, group)
    one, other = (results(function, x, group, dys) for function in (compiled, separate))
    for name in one:
        assert_same(one[name], other[name], name)


def test_weights_of_two_kinds_are_separate_layers(backend):
    check(*make(9, 64, QKV, kinds=("dense", "nf4")))


# --- what is shared on a GPU ----------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_launches_of_q_k_and_v(p):
    """One shrink and one dA for all, and dX written once and added to twice."""
    with simulated("triton-sim") as run:
        x, group = make(16, 32, ((16, 4, p), (8, 4, p), (8, 4, p)), BF16, ("dense",), BF16, False)
        dys = gradients(x, group)
        results(grouped, x, group, dys)
        names = [launch.kernel for launch in run.launches]
        run.launches.clear()
        results(separate, x, group, dys)
        before = [launch.kernel for launch in run.launches]
    assert names.count("_shrink") == names.count("_da") == 1
    assert before.count("_shrink") == before.count("_da") == 3
    assert names.count("_ds_db") == 3
    assert len(names) < len(before)


def test_x_is_read_once_for_every_dA():
    from fusetune._triton.lora_da import launch_lora_da

    x, ds = torch.randn(64, 128).to(BF16), [torch.randn(64, 16) for _ in range(4)]
    outs = [torch.empty(16, 128, dtype=BF16) for _ in ds]
    loaded = {}
    with simulated("triton-sim") as run:
        for count in (1, 3, 4):
            run.launches.clear()
            launch_lora_da(x, ds[:count], outs[:count], terms=1)
            first = run.launches[0]
            assert first.kernel == "_da"
            loaded[count] = 32 * first.counts.global_load_sectors
    more = loaded[4] - loaded[3]
    assert loaded[1] < loaded[3] == loaded[4] - more
    assert loaded[4] < 4 * loaded[1] - 3 * x.nbytes + 16 * ds[0].nbytes


def test_dx_is_not_measured_in_place(monkeypatch, tmp_path):
    """Measuring a way that adds to dX would add more than once."""
    monkeypatch.setenv("FUSETUNE_TUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with simulated("triton-sim"):
        from fusetune.ops import _gpu_choice

        _gpu_choice.forget()
        check(*make(37, 72, ((40, 16, 0.0), (24, 16, 0.0)), BF16, ("dense",), BF16))
        _gpu_choice.forget()


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lora_A": torch.ones(4, 9)}, ValueError, r"projections\[1\]: lora_A must have shape"),
        ({"lora_B": torch.ones(3, 4)}, ValueError, r"projections\[1\]: lora_B must have shape"),
        ({"dropout_p": 2.0}, ValueError, r"projections\[1\]: dropout_p must be between"),
        ({"scaling": "1"}, TypeError, r"projections\[1\]: scaling must be a number"),
        ({"weight": None}, TypeError, r"projections\[1\]: weight must be a tensor"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_arguments(change, error, message):
    x, group = make(3, 8, ((6, 4, 0.0), (6, 4, 0.0)), kinds=("dense",))
    group[1] |= change
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        grouped(x, group)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_projections():
    with pytest.raises(ValueError, match="projections must not be empty"):
        ops.lora_linear_group(torch.ones(2, 3), [])


def test_the_backends_of_any_machine_are_tested():
    assert set(HOST) == {"reference", "cpu"}
