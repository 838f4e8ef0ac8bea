"""rotary against float64 and transformers' function, on the reference and the CPU's kernel."""

import pytest
import torch
from backends import HOST
from tolerance import assert_close, one_thread
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fusetune import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# B, Hq, Hkv, T, D: a head below, at and across whole vectors, and one of a single pair
SHAPES = ((1, 1, 1, 1, 2), (2, 3, 1, 5, 10), (1, 4, 2, 7, 34), (2, 9, 3, 40, 64), (3, 2, 2, 2, 128))


@pytest.fixture(params=HOST)
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


def make(shape, dtype=torch.float32, *, rows=None):
    batch, heads, kv_heads, tokens, dim = shape
    query = torch.randn(batch, tokens, heads, dim).transpose(1, 2).to(dtype)
    key = torch.randn(batch, kv_heads, tokens, dim).to(dtype)
    # halves that differ, unlike a model's
    cos, sin = torch.randn(2, rows or batch, tokens, dim).to(dtype)
    return query, key, cos, sin


def run(function, query, key, cos, sin, upper):
    leaves = [t.detach().clone().requires_grad_() for t in (query, key)]
    out = function(*leaves, cos, sin)
    grads = torch.autograd.grad(out, leaves, upper)
    names = ("query", "key", "dquery", "dkey")
    return dict(zip(names, (*(t.detach() for t in out), *grads), strict=True))


def rounded(query, key, cos, sin):
    """transformers' function, its results in the dtype of what it turns."""
    return tuple(t.to(query.dtype) for t in apply_rotary_pos_emb(query, key, cos, sin))


def check(query, key, cos, sin):
    upper = tuple(torch.randn_like(t) for t in (query, key))
    got = run(ops.rotary, query, key, cos, sin, upper)
    with one_thread(), ops.use_backend("reference"):
        wide = [t.double() for t in (query, key, cos, sin)]
        exact = run(ops.rotary, *wide, [t.double() for t in upper])
        plain = run(rounded, query, key, cos, sin, upper)
    magnitude = turned_magnitudes(wide, upper)
    for name, value in got.items():
        assert_close(name, value, exact[name], plain[name], magnitude[name])


def turned_magnitudes(wide, upper):
    """The sums over absolute values, which is what rounding errors scale with."""
    query, key, cos, sin = (t.abs() for t in wide)
    sizes = {}
    for name, x, dy in zip(("query", "key"), (query, key), upper, strict=True):
        c, s, half = cos.unsqueeze(1), sin.unsqueeze(1), x.shape[-1] // 2
        sizes[name] = x * c + x.roll(half, -1) * s
        sizes[f"d{name}"] = dy.double().abs() * c + (dy.double().abs() * s).roll(half, -1)
    return sizes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(backend, shape, dtype):
    check(*make(shape, dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_same_numbers_as_transformers_in_fp32(backend, shape):
    query, key, cos, sin = make(shape)
    upper = tuple(torch.randn_like(t) for t in (query, key))
    got = run(ops.rotary, query, key, cos, sin, upper)
    expected = run(apply_rotary_pos_emb, query, key, cos, sin, upper)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_tables_of_one_row_and_of_another_dtype(backend):
    check(*make((3, 2, 1, 4, 16), rows=1))
    query, key, cos, sin = make((2, 2, 1, 4, 16), torch.bfloat16)
    check(query, key, cos.float(), sin.float())


def test_strides(backend):
    query, key, cos, sin = make((2, 3, 3, 5, 24))
    check(
        query[..., 3:13],
        key.transpose(-1, -2).contiguous().transpose(-1, -2)[..., :10],
        *(t[..., ::2][..., :10] for t in (cos, sin)),
    )
    check(query[:, :1].expand(-1, 3, -1, -1), key, cos, sin)


@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 4), (2, 2, 1, 0, 4)])
def test_empty(backend, shape):
    query, key, cos, sin = make(shape)
    assert [t.shape for t in ops.rotary(query, key, cos, sin)] == [query.shape, key.shape]


def test_twice_differentiable(backend):
    if backend == "cpu":
        pytest.skip("no kernel for float64")
    query, key, cos, sin = (t.double() for t in make((1, 2, 1, 2, 4)))
    leaves = query.requires_grad_(), key.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: ops.rotary(q, k, cos, sin), leaves)
    assert torch.autograd.gradgradcheck(lambda q, k: ops.rotary(q, k, cos, sin), leaves)


def test_whole_output_is_written(backend, monkeypatch):
    from fusetune.ops import _cpu

    def full_of_nan(*shape, dtype):
        return torch.full(shape, torch.nan, dtype=dtype)

    monkeypatch.setattr(_cpu, "empty", full_of_nan)
    check(*make((2, 3, 1, 5, 10)))


def test_opcheck():
    query, key, cos, sin = make((2, 2, 1, 3, 4))
    given = query.requires_grad_(), key.requires_grad_(), cos, sin, False
    torch.library.opcheck(torch.ops.fusetune.rotary.default, given)


def test_compiles_without_a_graph_break():
    given = make((2, 2, 1, 3, 4))
    function = torch.compile(ops.rotary, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(function(*given), ops.rotary(*given))


WRONG = {
    "an odd head": (lambda q, k, c, s: (q[..., :3], k, c, s), ValueError, "query must have shape"),
    "three dimensions": (lambda q, k, c, s: (q[0], k, c, s), ValueError, "query must have shape"),
    "integers": (lambda q, k, c, s: (q.long(), k, c, s), TypeError, "query must be float16"),
    "other tokens": (lambda q, k, c, s: (q, k[:, :, :1], c, s), ValueError, "key must have shape"),
    "another dtype": (lambda q, k, c, s: (q, k.half(), c, s), TypeError, "key must be"),
    "a short table": (lambda q, k, c, s: (q, k, c[:, :1], s), ValueError, "cos must have shape"),
    "a wide table": (lambda q, k, c, s: (q, k, c, s.double()), TypeError, "sin must be"),
    "a trained table": (
        lambda q, k, c, s: (q, k, c.requires_grad_(), s),
        ValueError,
        "cos must not",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_bad_arguments(kind):
    change, error, message = WRONG[kind]
    with pytest.raises(error, match=message):
        ops.rotary(*change(*make((2, 2, 1, 3, 4))))
