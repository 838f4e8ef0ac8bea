"""adapter_fusion on the CPU, block by block: the same for every size of a block; what is kept."""

import pytest
import torch
from fusion_cases import ALL, compare, fused, inputs, run

from fusetune import _native
from fusetune.ops import _adapter_fusion_blocks as blocks
from fusetune.ops import set_isa, use_backend

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
M, H = 37, 19  # more rows than columns: one map for the query
ISAS = _native.C.available_isas() if _native.C else []


@pytest.fixture(autouse=True)
def cut(monkeypatch):
    """cut(rows): blocks of so many rows from now on, twice as many where g has 16 bits.

    A test that never came to cut is at fault.
    """
    done = []
    forward = blocks._forward

    def counted(rows, *rest):
        done.append(len(rows) > 2 * blocks.BLOCK_ROWS)
        return forward(rows, *rest)

    monkeypatch.setattr(blocks, "_forward", counted)
    yield lambda rows: monkeypatch.setattr(blocks, "BLOCK_ROWS", rows)
    assert any(done)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("rows", [1, 8, 12, 18])
def test_against_the_definition(backend, cut, rows, dropout_p, dtype):
    cut(rows)
    compare(inputs(5, M, H, dtype), dropout_p=dropout_p, temperature=1.3)


@pytest.mark.parametrize(
    "leave_out",
    [
        ("value_weight",),
        ("residual",),
        ("query_weight", "query_bias"),
        ("key_weight", "key_bias"),
        ("query_bias", "key_bias"),
        ("query_bias",),
        ("query_weight", "query_bias", "key_weight", "key_bias", "value_weight", "residual"),
    ],
    ids=",".join,
)
def test_what_may_be_left_out(backend, cut, leave_out):
    cut(10)
    for dropout_p in (0.0, 0.3):
        compare(inputs(3, M, H, leave_out=leave_out), dropout_p=dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_every_size_of_a_block_gives_the_same_in_float64(cut, dropout_p):
    """Sums over M rows and H columns in another order: M + H roundings of what is summed, of 1."""
    tensors, upper = inputs(4, M, H, F64), torch.randn(M, H, dtype=F64)
    want = run(fused, tensors, upper, dropout_p=dropout_p)
    for rows in (1, 2, 5, 16, 36):
        cut(rows)
        got = run(fused, tensors, upper, dropout_p=dropout_p)
        for a, b in zip(got, want, strict=True):
            size = max(1, b.abs().max().item())
            torch.testing.assert_close(a, b, rtol=0, atol=(M + H) * torch.finfo(F64).eps * size)


@pytest.mark.parametrize("weights", [None, F32], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_every_run_gives_the_same_bits(backend, cut, dtype, weights):
    cut(8)
    tensors, upper = inputs(3, M, H, dtype, weights), torch.randn(M, H)
    first, second = (run(fused, tensors, upper, dropout_p=0.2) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_second_backward_pass(backend, cut, dtype):
    """The first one has overwritten g: the second one computes it again and gives the same."""
    cut(8)
    tensors, upper = inputs(3, M, H, dtype), torch.randn(M, H).to(dtype)
    torch.manual_seed(1)
    out = fused(tensors, dropout_p=0.3)
    leaves = list(tensors.values())
    first = torch.autograd.grad(out, leaves, upper, retain_graph=True)
    before = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(out, leaves, upper, retain_graph=True)
    third = torch.autograd.grad(out, [tensors["values"]], upper)
    for a, b, c in zip(first, before, second, strict=True):
        assert a.equal(b)
        assert c.equal(b)
    assert third[0].equal(before[ALL.index("values")])


@pytest.mark.parametrize(
    "trained",
    [
        ("values",),
        ("query",),
        ("query_weight", "query_bias"),
        ("key_bias",),
        ("value_weight", "values"),
        ("residual", "key_weight"),
    ],
    ids=",".join,
)
def test_what_need_not_be_trained(backend, cut, trained):
    upper = torch.randn(M, H)
    tensors = inputs(4, M, H)
    cut(8)
    every = run(fused, tensors, upper, dropout_p=0.3)[1:]
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in trained)
    torch.manual_seed(1)
    out = fused(tensors, dropout_p=0.3)
    got = torch.autograd.grad(out, [tensors[name] for name in trained], upper)
    for name, gradient in zip(trained, got, strict=True):
        torch.testing.assert_close(gradient, every[ALL.index(name)])


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_kept(cut, frozen):
    """Of the size of the query nothing but what is given, and g where values need a gradient."""
    cut(8)
    tensors = inputs(4, M, H)
    tensors["values"].requires_grad_(not frozen)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = fused(tensors)
    given = {tensors[name].data_ptr() for name in ("query", "values", "residual")}
    large = {t.untyped_storage().data_ptr() for t in kept if t.numel() >= M * H} - given
    assert len(large) == (0 if frozen else 1)
    if frozen:
        return
    (memory,) = large
    (dquery,) = torch.autograd.grad(out, [tensors["query"]], torch.ones_like(out))
    assert dquery.data_ptr() == memory


def test_a_list_stacks_and_strides(backend, cut):
    cut(8)
    tensors, upper = inputs(5, M, H), torch.randn(M, H)
    want = run(fused, tensors, upper, dropout_p=0.3)
    values = tensors["values"].detach()
    layouts = (
        values.permute(1, 0, 2).contiguous().permute(1, 0, 2),
        values.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([values, values], 2)[..., :H],
    )
    for view in layouts:
        got = run(fused, {**tensors, "values": view.requires_grad_()}, upper, dropout_p=0.3)
        torch.testing.assert_close(got, want)
    as_list = [part.clone().requires_grad_() for part in values]
    torch.manual_seed(1)
    out = fused(tensors, values=as_list, dropout_p=0.3)
    torch.testing.assert_close(out, want[0])
    gradients = torch.autograd.grad(out, as_list, upper)
    torch.testing.assert_close(torch.stack(gradients), want[1 + ALL.index("values")])
    strided = upper.T.contiguous().T
    torch.testing.assert_close(run(fused, tensors, strided, dropout_p=0.3), want)


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_under_autocast(cut, dtype):
    """The matmuls in bfloat16, as without blocks; of float64 as they are."""
    tensors, upper = inputs(3, M, H, dtype), torch.randn(M, H)
    results = []
    for rows in (M, 8):
        cut(rows)
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(1)
            out = fused(tensors, dropout_p=0.3)
            results.append([out, *torch.autograd.grad(out, tensors.values(), upper.to(out.dtype))])
    # bfloat16: roundings of g, of ctx W_v, of all gradients on the way back, and of blocks' sums.
    allowed = 1e-12 if dtype == F64 else 2.0**-6
    for want, got in zip(*results, strict=True):
        assert got.dtype == want.dtype
        assert (got - want).norm() <= allowed * want.norm() + 1e-5
    plain = run(fused, tensors, upper, dropout_p=0.3)
    assert plain[0].equal(results[1][0]) == (dtype != F32)


@pytest.mark.skipif(_native.C is None, reason="no native module")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_every_instruction_set(isa, dtype, cut):
    """Blocks that begin amid a counter of the mask, and leave a rest of the kernels' 8 rows."""
    before = _native.C.isa()
    set_isa(isa)
    cut(11)
    try:
        for n, h in ((1, 1), (3, 17), (5, 33)):
            for dropout_p in (0.0, 0.25):
                tensors, upper = inputs(n, M, h, dtype, F32), torch.randn(M, h)
                results = []
                for name in ("cpu", "reference"):
                    with use_backend(name):
                        results.append(run(fused, tensors, upper, dropout_p=dropout_p))
                for got, want in zip(*results, strict=True):
                    allowed = 2e-4 if got.dtype == F32 else 2 * torch.finfo(dtype).eps
                    torch.testing.assert_close(got, want, rtol=allowed, atol=allowed)
    finally:
        set_isa(before)
