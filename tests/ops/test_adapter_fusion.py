"""adapter_fusion against its definition, with keys and values projected, in float64."""

import pytest
import torch
from fusion_cases import ALL, compare, definition, eager, fused, in_dtype, inputs, run
from hypothesis import given, settings
from hypothesis import strategies as st

from fusetune import _native
from fusetune.ops import _adapter_fusion, adapter_fusion, set_isa, use_backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = _native.C.available_isas() if _native.C else []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 16, 33])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_output_and_gradients(backend, dtype, n, dropout_p):
    for m, h in ((37, 24), (9, 37), (1, 130)):
        compare(inputs(n, m, h, dtype), dropout_p=dropout_p, temperature=1.3)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("m", [3, 60])  # two thin matmuls for the query, and one by W_q^T W_k
def test_folding_is_exact_in_float64(m, dropout_p):
    tensors = inputs(5, m, 19, torch.float64)
    upper = torch.randn(m, 19, dtype=torch.float64)
    options = {"temperature": 0.7, "dropout_p": dropout_p}
    got = run(fused, tensors, upper, **options)
    want = run(definition, tensors, upper, **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13 * max(1, b.abs().max().item()))


@pytest.mark.parametrize(
    "leave_out",
    [
        ("value_weight",),
        ("residual",),
        ("value_weight", "residual"),
        ("query_weight", "query_bias"),
        ("key_weight", "key_bias"),
        ("query_bias", "key_bias"),
        ("query_weight", "query_bias", "key_weight", "key_bias", "value_weight", "residual"),
    ],
    ids=",".join,
)
def test_what_may_be_left_out(backend, leave_out):
    for dropout_p in (0.0, 0.3):
        compare(inputs(3, 50, 21, leave_out=leave_out), dropout_p=dropout_p)


def test_weights_in_fp32_with_16_bit_activations(backend):
    """They are not rounded: nearer to float64 than weights of 16 bits could be."""
    tensors = inputs(4, 40, 32, torch.bfloat16, weights=torch.float32)
    upper = torch.randn(40, 32)
    exact = run(definition, in_dtype(tensors, torch.float64), upper, dropout_p=0.2)
    for got, want in zip(run(fused, tensors, upper, dropout_p=0.2), exact, strict=True):
        # dp is sums of upper values: a 16-bit residual and result round once, gradients not at all.
        allowed = 2**-8 if got.dtype == torch.bfloat16 else 2**-7
        assert (got.double() - want).norm() <= allowed * want.norm() + 1e-6


def test_the_key_bias_has_a_gradient_of_zeros_without_dropout(backend):
    tensors = inputs(3, 12, 8)
    upper = torch.randn(12, 8)
    position = 1 + ALL.index("key_bias")
    assert run(fused, tensors, upper)[position].eq(0).all()
    assert run(fused, tensors, upper, dropout_p=0.5)[position].ne(0).any()


def test_every_row_empty_or_dropped(backend):
    tensors = inputs(3, 0, 8)
    got = run(fused, tensors, torch.randn(0, 8), dropout_p=0.2)
    assert got[0].shape == (0, 8)
    assert got[1 + ALL.index("value_weight")].eq(0).all()
    tensors = inputs(4, 6, 8, leave_out=("value_weight", "residual"))
    got = run(fused, tensors, torch.randn(6, 8), dropout_p=1.0)  # all scores 0: the mean
    torch.testing.assert_close(got[0], tensors["values"].mean(0).detach())
    assert got[1 + ALL.index("query")].eq(0).all()


def test_a_list_and_strided_stacks(backend):
    """AdapterHub stacks along the last dimension but one; a list need not be stacked at all."""
    tensors = inputs(5, 14, 12)
    upper = torch.randn(14, 12)
    want = run(fused, tensors, upper, dropout_p=0.3)
    values = tensors["values"].detach()
    layouts = {
        "adapterhub": values.permute(1, 0, 2).contiguous().permute(1, 0, 2),
        "columns": values.transpose(1, 2).contiguous().transpose(1, 2),
        "cut": torch.cat([values, values], 2)[..., :12],
        "expanded": values,
    }
    for view in layouts.values():
        got = run(fused, {**tensors, "values": view.requires_grad_()}, upper, dropout_p=0.3)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    as_list = [part.clone().requires_grad_() for part in values]
    torch.manual_seed(1)
    out = fused(tensors, values=as_list, dropout_p=0.3)
    torch.testing.assert_close(out, want[0], rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(out, as_list, upper)
    torch.testing.assert_close(torch.stack(grads), want[1 + ALL.index("values")])


def test_leading_dimensions_and_attention(backend):
    tensors = inputs(3, 24, 10)
    out, p = adapter_fusion(**tensors, return_attention=True)
    batched = {
        name: t.detach().unflatten(-2, (2, 3, 4)) if name in ("query", "values", "residual") else t
        for name, t in tensors.items()
    }
    got, attention = adapter_fusion(**batched, return_attention=True)
    torch.testing.assert_close(got.flatten(0, 2), out)
    assert attention.shape == (2, 3, 4, 3)
    assert not attention.requires_grad
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3, 4))
    torch.testing.assert_close(attention.flatten(0, 2), p)


@pytest.mark.parametrize("scale", [1e4, 1e18, 1e-20])
def test_scores_of_any_size(backend, scale):
    """Large ones leave one adapter, and no NaN."""
    tensors = inputs(9, 11, 16, scale=scale, leave_out=("query_bias", "key_bias"))
    upper = torch.randn(11, 16)
    exact = run(definition, in_dtype(tensors, torch.float64), upper)
    got = run(fused, tensors, upper)
    torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-3, atol=1e-3)
    assert all(g.isfinite().all() for g in got)


def test_nan_and_infinity_stay_in_their_row(backend):
    tensors = inputs(6, 9, 16, leave_out=("value_weight", "residual"))
    with torch.no_grad():
        tensors["values"][5, 2, 3] = torch.nan
        tensors["query"][4, 0] = torch.inf
    out = fused(tensors)
    bad = [row in (2, 4) for row in range(9)]
    assert out.isnan().any(1).tolist() == bad
    assert eager(tensors).isnan().any(1).tolist() == bad


def test_nothing_of_the_values_size_is_kept_but_the_values():
    tensors = inputs(4, 50, 32)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused(tensors)
    large = {t.untyped_storage().data_ptr() for t in kept if t.numel() >= 4 * 50 * 32}
    assert large == {tensors["values"].data_ptr()}


@pytest.mark.skipif(_native.C is None, reason="no native module")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa, dtype):
    """Columns that leave a rest in every width of vectors, adapters that leave one of 4."""
    before = _native.C.isa()
    set_isa(isa)
    try:
        for n, m, h in ((1, 1, 1), (2, 8, 3), (3, 9, 17), (5, 17, 33), (18, 3, 100)):
            g, upper = torch.randn(m, h), torch.randn(m, h)
            values = [torch.randn(part, m, h).to(dtype) for part in (1, n)]
            offset, seed = torch.randn(m), torch.tensor([5])
            results = []
            for name in ("cpu", "reference"):
                with use_backend(name):
                    ctx, p = _adapter_fusion._forward(g, values, offset, 1.5, 0.25, seed)
                    back = _adapter_fusion._backward(upper, g, values, p, 1.5, 0.25, seed, True)
                results.append([ctx, p, back[0], *back[1], back[2]])
            for got, want in zip(*results, strict=True):
                tolerance = 2e-4 if got.dtype == torch.float32 else torch.finfo(dtype).eps
                torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    finally:
        set_isa(before)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 70), m=st.integers(0, 20), h=st.integers(1, 70), p=st.sampled_from([0, 0.4])
)
def test_any_shape(n, m, h, p):
    torch.manual_seed(n + m + h)
    compare(inputs(n, m, h), dropout_p=p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck_in_float64(dropout_p):
    tensors = inputs(3, 5, 4, torch.float64)

    def function(*leaves):
        torch.manual_seed(2)
        return fused(dict(zip(ALL, leaves, strict=True)), 1.4, dropout_p)

    assert torch.autograd.gradcheck(function, [tensors[name] for name in ALL])
