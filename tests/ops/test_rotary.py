"""rotary against float64 and transformers' function, on the reference and the CPU's kernel."""

import pytest
import torch
from rotary_cases import (
    DTYPES,
    SHAPES,
    assert_matches_float64,
    assert_same_numbers_as_transformers,
    inputs,
)

from fusetune import ops


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(backend, shape, dtype):
    assert_matches_float64(*inputs(shape, dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_same_numbers_as_transformers_in_fp32(backend, shape):
    assert_same_numbers_as_transformers(*inputs(shape))


def test_tables_of_one_row_and_of_another_dtype(backend):
    assert_matches_float64(*inputs((3, 2, 1, 4, 16), rows=1))
    query, key, cos, sin = inputs((2, 2, 1, 4, 16), torch.bfloat16)
    assert_matches_float64(query, key, cos.float(), sin.float())


def test_strides(backend):
    query, key, cos, sin = inputs((2, 3, 3, 5, 24))
    assert_matches_float64(
        query[..., 3:13],
        key.transpose(-1, -2).contiguous().transpose(-1, -2)[..., :10],
        *(t[..., ::2][..., :10] for t in (cos, sin)),
    )
    assert_matches_float64(query[:, :1].expand(-1, 3, -1, -1), key, cos, sin)


@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 4), (2, 2, 1, 0, 4)])
def test_empty(backend, shape):
    query, key, cos, sin = inputs(shape)
    assert [t.shape for t in ops.rotary(query, key, cos, sin)] == [query.shape, key.shape]


def test_twice_differentiable(backend):
    if backend == "cpu":
        pytest.skip("no kernel for float64")
    query, key, cos, sin = (t.double() for t in inputs((1, 2, 1, 2, 4)))
    leaves = query.requires_grad_(), key.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: ops.rotary(q, k, cos, sin), leaves)
    assert torch.autograd.gradgradcheck(lambda q, k: ops.rotary(q, k, cos, sin), leaves)


def test_whole_output_is_written(backend, monkeypatch):
    from fusetune.ops import _cpu

    def full_of_nan(*shape, dtype):
        return torch.full(shape, torch.nan, dtype=dtype)

    monkeypatch.setattr(_cpu, "empty", full_of_nan)
    assert_matches_float64(*inputs((2, 3, 1, 5, 10)))


def test_opcheck():
    query, key, cos, sin = inputs((2, 2, 1, 3, 4))
    given = query.requires_grad_(), key.requires_grad_(), cos, sin, False
    torch.library.opcheck(torch.ops.fusetune.rotary.default, given)


def test_compiles_without_a_graph_break():
    given = inputs((2, 2, 1, 3, 4))
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
        ops.rotary(*change(*inputs((2, 2, 1, 3, 4))))
