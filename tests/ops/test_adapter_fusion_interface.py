"""adapter_fusion: torch.library, torch.compile, and what bad arguments are told."""

import pytest
import torch

from fusetune.ops import adapter_fusion

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck(dtype, dropout_p):
    g = torch.randn(5, 7).to(dtype).requires_grad_()
    values = [torch.randn(n, 5, 7).to(dtype).requires_grad_() for n in (2, 1)]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    offset = torch.randn(5, dtype=acc, requires_grad=True)
    seed = torch.tensor([9]) if dropout_p else None
    arguments = (g, values, offset, 1.5, dropout_p, seed)
    torch.library.opcheck(torch.ops.fusetune.fusion_attend.default, arguments)
    ctx, p = (t.detach() for t in torch.ops.fusetune.fusion_attend(*arguments))
    for need in (True, False):
        arguments = (ctx, g.detach(), [v.detach() for v in values], p, 1.5, dropout_p, seed, need)
        torch.library.opcheck(torch.ops.fusetune.fusion_attend_backward.default, arguments)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("as_list", [False, True])
def test_compiled_equals_eager(as_list):
    leaves = [torch.randn(s, requires_grad=True) for s in ((6, 8), (3, 6, 8), (8, 8), (8, 8))]

    def function(query, values, query_weight, value_weight):
        given = list(values.unbind()) if as_list else values
        return adapter_fusion(query, given, query_weight, None, None, None, value_weight)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    upper = torch.randn(6, 8)
    for run in (True, False):
        leaves[1].requires_grad_(run)  # the values need no gradient while adapters are frozen
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        got, want = (f(*leaves) for f in (compiled, function))
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(out, needed, upper) for out in (got, want)]
        torch.testing.assert_close(*grads)


def test_under_autocast():
    """The matmuls run in bfloat16, as torch's own would; the attention takes what it is given."""
    query, values = torch.randn(6, 8), torch.randn(3, 6, 8)
    weights = [torch.randn(8, 8) / 8**0.5 for _ in range(3)]

    def run():
        return adapter_fusion(query, values, weights[0], None, weights[1], None, weights[2])

    with torch.autocast("cpu", torch.bfloat16):
        out = run()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, run(), rtol=0.05, atol=0.05)
    assert not out.equal(run())


GOOD = {
    "query": torch.randn(4, 8),
    "values": torch.randn(3, 4, 8),
    "query_weight": torch.randn(8, 8),
    "query_bias": torch.randn(8),
    "key_weight": torch.randn(8, 8),
    "key_bias": torch.randn(8),
    "value_weight": torch.randn(8, 8),
    "residual": torch.randn(4, 8),
}
BAD = [
    ({"query": torch.ones(4, 8, dtype=torch.int64)}, TypeError, "query must be float16"),
    ({"query": torch.randn(4, 0)}, ValueError, "query must have shape"),
    ({"values": torch.randn(4)}, ValueError, r"values must have shape \[N, ..., H\]"),
    ({"values": torch.randn(0, 4, 8)}, ValueError, "at least one adapter"),
    ({"values": []}, ValueError, "at least one adapter"),
    ({"values": 3}, TypeError, "values must be a tensor or tensors, got int"),
    ({"values": [torch.randn(4, 8), None]}, TypeError, r"values\[1\] must be a tensor"),
    ({"values": torch.randn(3, 5, 8)}, ValueError, r"got \[3, 5, 8\]"),
    ({"values": [torch.randn(4, 8), torch.randn(4, 7)]}, ValueError, r"got \[1, 4, 7\]"),
    ({"values": [torch.randn(4, 8), torch.randn(4, 8).half()]}, TypeError, "values must be of one"),
    ({"values": torch.randn(3, 4, 8, device="meta")}, ValueError, "values are on meta"),
    ({"query_weight": torch.randn(5, 7)}, ValueError, r"query_weight must have shape \(5, 8\)"),
    ({"query_weight": torch.randn(5, 8)}, ValueError, r"key_weight must have shape \(5, 8\)"),
    ({"query_weight": torch.tensor(1.0)}, ValueError, "query_weight must have shape"),
    ({"key_weight": None}, ValueError, "key_bias is given, but key_weight is None"),
    ({"query_bias": torch.randn(7)}, ValueError, r"query_bias must have shape \(8,\)"),
    ({"value_weight": torch.randn(8, 9)}, ValueError, r"value_weight must have shape \(8, 8\)"),
    ({"value_weight": torch.randn(8, 8, device="meta")}, ValueError, "value_weight is on meta"),
    ({"residual": torch.randn(8)}, ValueError, r"residual must have shape \(4, 8\)"),
    ({"temperature": 0.0}, ValueError, "temperature must be positive"),
    ({"temperature": float("nan")}, ValueError, "temperature must be positive"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[case[2] for case in BAD])
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        adapter_fusion(**{**GOOD, **change})


def test_evaluation_does_not_drop_out():
    want = adapter_fusion(**GOOD)
    assert adapter_fusion(**GOOD, dropout_p=0.5, training=False).equal(want)
    assert not adapter_fusion(**GOOD, dropout_p=0.5).equal(want)
