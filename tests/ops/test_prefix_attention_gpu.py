"""prefix_attend by Triton, simulated: shapes, prefixes of rows, masks, dropout, bytes, reasons."""

import pytest
import torch
from backends import TRITON, simulated
from tolerance import assert_same

from fusetune import ops
from fusetune.ops import _triton
from fusetune.ops._registry import OPS, Case
from fusetune.reference import prefix_attention as reference
from fusetune.reference.dropout import new_seed

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def by_tokens(b, h, t, d, dtype):
    """[B, H, T, D] as a model has it: memory in the order of [B, T, H, D]."""
    return torch.randn(b, t, h, d).to(dtype).transpose(1, 2)


def run(name, query, prefix, *arguments):
    return OPS[name].run(query.device.type, query.dtype, prefix.dtype)(*arguments)


def double(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


def check(
    shape,
    dtype,
    prefix=None,
    *,
    groups=1,
    rows=None,
    lengths=None,
    bias=None,
    window=0,
    position=0,
    p=0.0,
    masked=False,
    given=True,
    size=1.0,
):
    """Forward and backward against the reference on the same numbers in float64.

    shape: B, Hq, Hkv, T, D, P. masked: some rows attend to no token. given: whether dquery is.
    """
    b, heads, heads_kv, t, d, count = shape
    query, base, dout = (by_tokens(b, heads, t, d, dtype) for _ in range(3))
    query *= size
    lse = torch.randn(b, heads, t) + 1
    if masked:
        lse[0], lse[-1, 0, 0] = torch.inf, -torch.inf
        base[0], base[-1, 0, 0] = torch.nan, torch.nan
    # As a flat weight of several layers has it.
    layers = torch.randn(groups, count, 3, 2, heads_kv, d).to(prefix or dtype)
    key, value = layers[:, :, 1].unbind(2)
    seed = new_seed(query.device) if p else None
    options = reference.Options(bias, rows, lengths, d**-0.5, window, position, p, seed)

    exact = reference.prefix_attend(*double((query, key, value, base, lse)), options)
    out, sums = run("prefix_attend", query, key, query, key, value, base, lse, options)
    assert_same(out, exact[0], "out")
    none = exact[1].isinf()
    assert torch.equal(sums.isinf(), none)
    assert (sums[none] > 0).all()
    assert_same(sums[~none], exact[1][~none], "lse")

    tensors = (
        dout,
        query,
        key,
        value,
        *(e.to(t.dtype) for e, t in zip(exact, (out, sums), strict=True)),
    )
    dquery = by_tokens(b, heads, t, d, dtype) if given else None
    wide = None if dquery is None else dquery.double()
    exact = reference.prefix_attend_backward(*double(tensors), options, wide, True, True)
    found = run("prefix_attend_backward", query, key, *tensors, options, dquery, True, True)
    for name, got, expected in zip(("query", "key", "value"), found, exact, strict=True):
        assert_same(got, expected, f"d{name}")


@pytest.mark.parametrize("backend", TRITON, indirect=True)
@pytest.mark.parametrize(
    ("shape", "dtype", "prefix"),
    [
        ((2, 6, 2, 37, 64, 30), F32, F32),
        ((2, 6, 2, 37, 64, 30), BF16, BF16),
        ((1, 2, 1, 5, 20, 3), F16, F32),
        ((1, 2, 1, 5, 20, 3), F32, BF16),
        ((2, 1, 1, 1, 80, 40), F16, F16),
        ((1, 1, 1, 3, 200, 18), BF16, F32),
        ((2, 3, 1, 30, 100, 18), BF16, F32),
        ((1, 1, 1, 1, 1, 1), BF16, F32),
    ],
    ids=str,
)
def test_shapes(backend, shape, dtype, prefix):
    check(shape, dtype, prefix)


@pytest.mark.parametrize("backend", TRITON, indirect=True)
def test_prefixes_of_rows(backend):
    """Padded ones, none at all, dropout, and rows that attend to no token."""
    rows, lengths = torch.tensor([2, -1, 0, 2]), torch.tensor([35, 4, 21])
    options = {"groups": 3, "rows": rows, "lengths": lengths, "masked": True}
    check((4, 4, 2, 9, 40, 35), BF16, F32, p=0.3, **options)
    check((4, 2, 2, 9, 18, 35), F32, given=False, **options)
    check((3, 2, 2, 3, 16, 20), F32, p=0.3)
    check((3, 2, 1, 3, 16, 20), F32, lengths=torch.tensor([0]), masked=True, given=False)


@pytest.mark.parametrize("backend", TRITON, indirect=True)
def test_bias_and_window(backend):
    bias = torch.randn(1, 4, 9, 20)
    check((2, 4, 2, 9, 16, 20), F32, bias=bias, window=12, position=2)
    # Very negative scores, which fp32 has exactly, beside tokens and alone.
    bias = torch.randint(-1010, -990, (2, 1, 9, 20)).float()
    check((2, 2, 2, 9, 16, 20), F32, bias=bias, size=0.0, masked=True)


def test_nothing_to_attend_to():
    """No rows, no keys; and a NaN stays one."""
    with simulated("triton-sim") as sim:
        check((2, 2, 1, 0, 16, 3), F32)
        check((2, 2, 1, 3, 16, 0), F32, masked=True, given=False)
        query, base = torch.randn(1, 1, 2, 16), torch.randn(1, 1, 2, 16)
        key, lse = torch.randn(1, 3, 1, 16), torch.tensor([[[torch.nan, 0.0]]])
        options = reference.Options(scale=1.0)
        out, _ = run("prefix_attend", query, key, query, key, key, base, lse, options)
        assert out.isnan().all(-1).tolist() == [[[True, False]]]
    assert {launch.kernel for launch in sim.launches} == {"_prefix_attend"}


def test_only_what_is_needed():
    """And the same bits every time; in place of what is given."""
    query, dout = by_tokens(2, 4, 70, 16, F32), by_tokens(2, 4, 70, 16, F32)
    key, lse = torch.randn(1, 20, 2, 16), torch.full((2, 4, 70), 3.0)
    options = reference.Options(scale=0.25)

    def backward(dquery, *needs):
        name, tensors = "prefix_attend_backward", (dout, query, key, key, dout, lse)
        return run(name, query, key, *tensors, options, dquery, *needs)

    with simulated("triton-sim") as sim:
        dquery, dkey, dvalue = backward(None, True, True)
        again = backward(None, True, True)
        base = torch.zeros_like(dquery)
        only_query = backward(base, True, False)
        only_prefix = backward(None, False, True)
    assert all(torch.equal(a, b) for a, b in zip((dquery, dkey, dvalue), again, strict=True))
    assert only_query[0] is base
    assert torch.equal(base, dquery)
    assert only_query[1:] == (None, None)
    assert only_prefix[0] is None
    assert torch.equal(only_prefix[1], dkey)
    assert torch.equal(only_prefix[2], dvalue)
    opcodes = {op for launch in sim.launches for op in launch.counts.instructions}
    assert not [op for op in opcodes if op.startswith(("atom", "red"))]


def test_bytes():
    """What is not of the prefix moves once each way. The prefix lies in memory once and is read by
    each program, not for each row; as long as COLS keys hold it. Its gradient has one share for
    each range of rows."""
    b, heads, heads_kv, t, d, count = 4, 4, 2, 64, 64, 32
    query, base, dout, dquery = (by_tokens(b, heads, t, d, BF16) for _ in range(4))
    key, value = (torch.randn(1, count, heads_kv, d).to(BF16) for _ in range(2))
    lse = torch.zeros(b, heads, t)
    options = reference.Options(scale=0.125)
    with simulated("triton-sim") as sim:
        out, lse = run("prefix_attend", query, key, query, key, value, base, lse, options)
        tensors = (dout, query, key, value, out, lse, options, dquery, True, True)
        run("prefix_attend_backward", query, key, *tensors)
    forward, backward, sums = sim.launches
    matrix, numbers = query.nbytes, lse.nbytes
    head = 2 * count * d * 2  # bytes of one head of keys and values

    programs = b * heads // heads_kv * t // 64  # of 64 rows
    assert forward.grid == (programs, heads_kv, 1)
    once = 2 * matrix + numbers + heads_kv * programs * head
    assert once <= 32 * forward.counts.global_load_sectors <= once + 3 * numbers  # lse, by warps
    assert 32 * forward.counts.global_store_sectors == matrix + numbers

    ranges = backward.grid[0]
    assert ranges * 4 * 64 <= b * heads // heads_kv * t  # of at least four blocks
    once = 4 * matrix + numbers + heads_kv * ranges * head
    assert once <= 32 * backward.counts.global_load_sectors <= once + 3 * numbers
    share = 2 * heads_kv * head  # in fp32
    assert 32 * backward.counts.global_store_sectors == matrix + ranges * share
    assert 32 * sums.counts.global_load_sectors == ranges * share
    assert 32 * sums.counts.global_store_sectors == heads_kv * head


@pytest.mark.parametrize("backend", TRITON, indirect=True)
def test_the_whole_op(backend):
    """Base attention included, in the query's memory order."""
    leaves = [by_tokens(2, h, 5, 16, F32).detach().requires_grad_() for h in (4, 2, 2)]
    leaves += [torch.randn(7, 2, 16).requires_grad_() for _ in range(2)]
    dout = by_tokens(2, 4, 5, 16, F32)
    out = ops.prefix_attention(*leaves, is_causal=True)
    found = torch.autograd.grad(out, leaves, dout)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    with ops.use_backend("reference"):
        exact = ops.prefix_attention(*wide, is_causal=True)
        expected = torch.autograd.grad(exact, wide, dout.double())
    assert_same(out, exact, "out")
    for i, (a, e) in enumerate(zip(found, expected, strict=True)):
        assert_same(a, e, f"gradient {i}")


def test_reasons(monkeypatch):
    with simulated("triton-sim"), ops.use_backend("auto"):
        for op in ("prefix_attend", "prefix_attend_backward"):
            assert OPS[op].select(Case("cpu", BF16, F32)).name == "triton"
            reasons = dict(OPS[op].explain(Case("cpu", torch.float64, torch.float64)))
            assert "float64" in reasons["triton"]
            monkeypatch.setattr(_triton, "capability", lambda device=None: 75)
            reasons = dict(OPS[op].explain(Case("cpu", BF16, BF16)))
            assert "sm_75" in reasons["triton"]
            monkeypatch.undo()


def test_wide_heads_are_left_to_torch():
    with simulated("triton-sim") as sim:
        check((1, 1, 1, 2, 264, 3), F32)
    assert not sim.launches
