"""prefix_attention against one softmax over prefix and keys joined in a tensor, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_cases import NAMES, compare, in_dtype, inputs, joined, run

from fusetune import _native
from fusetune.ops import prefix_attention, set_isa, use_backend

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = [(FP32, FP32), (BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16)]
ISAS = _native.C.available_isas() if _native.C else []


def padding(batch=2, tokens=9, keys=9):
    """Row 0 sees all, row 1 not its first 3 keys, and its query 2 no key at all."""
    mask = torch.ones(batch, 1, tokens, keys, dtype=torch.bool).tril(keys - tokens)
    mask[1, :, :, :3] = False
    return mask


@pytest.mark.parametrize(("dtype", "prefix_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 5, 16, 33])
def test_output_and_gradients(backend, dtype, prefix_dtype, prefix):
    compare(inputs(prefix=prefix, dtype=dtype, prefix_dtype=prefix_dtype), is_causal=True)


@pytest.mark.parametrize("mask", ["bool", "additive", "one row", "of heads"])
def test_masks_concern_the_keys_alone(backend, mask):
    masks = {
        "bool": padding(),
        "additive": torch.randn(2, 6, 9, 9).masked_fill_(~padding(), -torch.inf),
        "one row": torch.rand(9) > 0.4,
        "of heads": torch.randn(6, 1, 9),
    }
    compare(inputs(), attn_mask=masks[mask])


@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (1, 20), (7, 0), (1, 0), (0, 4), (70, 70)])
@pytest.mark.parametrize("prefix", [0, 1, 7])
def test_few_tokens_and_few_keys(backend, tokens, keys, prefix):
    """Without keys the prefix's is the whole softmax; without either the result is zeros."""
    tensors = inputs(tokens=tokens, keys=keys, prefix=prefix)
    compare(tensors, is_causal=tokens == keys)
    if not keys and not prefix:
        assert prefix_attention(**tensors).eq(0).all()


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (9, 3), (8, 1)])
def test_grouped_heads(backend, heads, kv_heads):
    compare(inputs(heads=heads, kv_heads=kv_heads), attn_mask=padding())


@pytest.mark.parametrize("dim", [1, 8, 20, 64, 100])
def test_any_size_of_a_head(backend, dim):
    compare(inputs(dim=dim, prefix=3), is_causal=True, scale=0.3)


@pytest.mark.parametrize("window", [1, 4, 9, 100])
@pytest.mark.parametrize("position", [0, 3])
def test_sliding_window(backend, window, position):
    """Blocks of 48 queries, some of which see nothing of the prefix any more."""
    options = {"window": window, "position": position, "is_causal": True}
    compare(inputs(tokens=60, keys=60, prefix=37), **options)


@pytest.mark.parametrize("shape", [(1, 6), (2, 1), (1, 1), (2, 6)])
def test_bias(backend, shape):
    compare(inputs(), prefix_bias=torch.randn(*shape, 9, 5), attn_mask=padding())


@pytest.mark.parametrize("lengths", [None, [4, 0, 5]])
@pytest.mark.parametrize("options", [{}, {"window": 6}, {"prefix_dropout_p": 0.4}], ids=str)
def test_a_prefix_for_each_row(backend, lengths, options):
    """Some have none, some a shorter one; neighbours that share one are reduced together."""
    tensors = inputs(batch=5, groups=3)
    lengths = None if lengths is None else torch.tensor(lengths)
    compare(tensors, rows=torch.tensor([2, -1, 0, 0, 1]), lengths=lengths, **options)


def test_rows_that_nothing_is_seen_of(backend):
    """No prefix, and a query whose keys are masked: zeros, and no gradient that is not finite."""
    tensors = inputs(groups=1)
    options = {"rows": torch.tensor([0, -1]), "attn_mask": padding()}
    compare(tensors, **options)
    out = prefix_attention(**tensors, **options)
    assert out[1, :, :3].eq(0).all()
    assert out[1, :, 3:].ne(0).all()


def test_a_masked_row_is_the_prefix_alone(backend):
    tensors = inputs(tokens=1, keys=4)
    masked = prefix_attention(**tensors, attn_mask=torch.zeros(1, 4, dtype=torch.bool))
    none = {name: t[:, :, :0] if name in ("key", "value") else t for name, t in tensors.items()}
    torch.testing.assert_close(masked, prefix_attention(**none), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("which", ["prefix", "keys", "both"])
def test_very_negative_scores(backend, which):
    """Of a magnitude that no exponential survives: the other segment is left, or their ratio."""
    tensors = inputs(dtype=FP32)
    with torch.no_grad():
        tensors["query"].abs_()
        if which != "keys":
            tensors["prefix_key"].abs_().mul_(-1e4)
        if which != "prefix":
            tensors["key"].abs_().mul_(-1e4)
    compare(tensors)


def test_the_most_negative_mask(backend):
    """transformers masks by the most negative number: with a prefix such a row is its alone."""
    lowest = torch.finfo(FP32).min
    mask = torch.zeros(2, 1, 9, 9).masked_fill_(~padding(), lowest)
    compare(inputs(), attn_mask=mask)


@pytest.mark.parametrize("prefix_dropout_p", [0.3, 1.0])
def test_dropout(backend, prefix_dropout_p):
    compare(inputs(batch=3), is_causal=True, prefix_dropout_p=prefix_dropout_p)


def test_dropout_of_values_is_right_on_average(backend):
    """Equal keys weigh all values alike; the mean over many rows is the value itself."""
    batch, prefix, dim = 400, 8, 16
    query, key = torch.randn(batch, 1, 1, dim), torch.zeros(batch, 1, 0, dim)
    zeros = torch.zeros(prefix, 1, dim)
    value = torch.randn(prefix, 1, dim)
    torch.manual_seed(1)
    out = prefix_attention(query, key, key, zeros, value, prefix_dropout_p=0.25)
    # Of each of 8 terms v / 8 the variance is v^2 / 64 p / (1 - p); 5 standard errors.
    error = (value.square().sum(0) / 64 / 3 / batch).sqrt()
    assert ((out.mean(0)[0] - value.mean(0)).abs() <= 5 * error).all()
    assert out.std(0).gt(0).all()
    assert prefix_attention(
        query, key, key, zeros, value, prefix_dropout_p=0.25, training=False
    ).allclose(value.mean(0).expand(batch, 1, 1, dim), atol=1e-6)


def test_views_are_read_where_they_lie(backend):
    """PEFT's flat weight [P, layers * 2 * Hkv * D], and heads that lie behind the tokens."""
    flat = torch.randn(5, 4 * 2 * 48, requires_grad=True)
    whole = torch.randn(2, 9, 12, 16).requires_grad_()

    def function(query, key, value, prefix_key, prefix_value):
        return prefix_attention(query, key, value, prefix_key, prefix_value, is_causal=True)

    def call(copy):
        query, key, value = (x.transpose(1, 2) for x in whole.split((6, 3, 3), 2))
        parts = flat.view(5, 4, 2, 3, 16)
        given = [query, key, value, parts[:, 2, 0], parts[:, 2, 1]]
        given = [x.contiguous() for x in given] if copy else given
        out = function(*given)
        return out, *torch.autograd.grad(out.square().sum(), [whole, flat])

    for got, want in zip(call(False), call(True), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    strange = inputs()
    swapped = {n: t.detach().mT.contiguous().mT.requires_grad_() for n, t in strange.items()}
    assert swapped["query"].stride(-1) != 1
    compare(swapped, is_causal=True)


@pytest.mark.parametrize("frozen", [("query",), ("query", "key", "value"), NAMES[3:]], ids=str)
def test_what_needs_no_gradient_costs_none(backend, frozen):
    tensors = inputs()
    want = dict(
        zip(NAMES, run(prefix_attention, tensors, torch.ones(2, 6, 9, 16))[1:], strict=True)
    )
    for name in frozen:
        tensors[name].requires_grad_(False)
    out = prefix_attention(**tensors)
    out.backward(torch.ones(2, 6, 9, 16))
    for name, tensor in tensors.items():
        if name in frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, want[name])


def test_nan_is_not_hidden(backend):
    for name in ("query", "key", "prefix_key"):
        tensors = inputs()
        with torch.no_grad():
            tensors[name][..., 0, 0] = torch.nan
        assert prefix_attention(**tensors).isnan().any(), name


def test_nothing_of_the_scores_size_is_kept():
    tensors = inputs(tokens=200, keys=200, prefix=40)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        prefix_attention(**tensors, is_causal=True)
    own = {t.untyped_storage().data_ptr() for t in tensors.values()}
    new = sum(t.numel() for t in kept if t.untyped_storage().data_ptr() not in own)
    assert new == 2 * 6 * 200 * (16 + 1)  # out and its log-sum-exp


@pytest.mark.skipif(_native.C is None, reason="no native module")
@pytest.mark.parametrize("prefix_dropout_p", [0.0, 0.2])
def test_the_same_numbers_on_any_number_of_threads(prefix_dropout_p):
    """Gradients of the prefix are sums over batch, heads and tokens, in an order that is fixed."""
    tensors = inputs(batch=7, tokens=60, keys=60, prefix=30)
    upper = torch.randn(7, 6, 60, 16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            options = {"is_causal": True, "prefix_dropout_p": prefix_dropout_p}
            results.append(run(prefix_attention, tensors, upper, **options)[4:])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(_native.C is None, reason="no native module")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_every_instruction_set(isa, dtype):
    before = _native.C.isa()
    set_isa(isa)
    try:
        with use_backend("cpu"):
            for prefix, dim in ((1, 1), (3, 17), (17, 33), (40, 64)):
                tensors = inputs(prefix=prefix, dim=dim, dtype=dtype, prefix_dtype=FP32)
                compare(tensors, attn_mask=padding(), prefix_dropout_p=0.25)
    finally:
        set_isa(before)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 60), keys=st.integers(0, 12), prefix=st.integers(0, 40),
    dim=st.integers(1, 40), window=st.sampled_from([None, 5, 50]), p=st.sampled_from([0.0, 0.4]),
)  # fmt: skip
def test_any_shape(tokens, keys, prefix, dim, window, p):
    torch.manual_seed(tokens + keys + prefix + dim)
    tensors = inputs(tokens=tokens, keys=keys, prefix=prefix, dim=dim)
    compare(tensors, window=window, prefix_dropout_p=p)


OPTIONS = [
    {"is_causal": True},
    {"attn_mask": padding(tokens=4, keys=4)},
    {"window": 5, "position": 1, "prefix_bias": torch.randn(1, 2, 4, 3)},
    {"prefix_dropout_p": 0.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=[",".join(o) for o in OPTIONS])
@pytest.mark.parametrize("keys", [4, 0])
def test_gradcheck_in_float64(options, keys):
    if not keys and "attn_mask" in options:
        options = {}
    shape = {"heads": 2, "kv_heads": 1, "tokens": 4, "keys": keys, "dim": 3, "prefix": 3}
    tensors = in_dtype(inputs(**shape), FP64)

    def function(*leaves):
        torch.manual_seed(2)
        return prefix_attention(*leaves, **options)

    assert torch.autograd.gradcheck(function, list(tensors.values()))


def test_float64_to_the_last_digits():
    """Over the blocks that causal attention is cut into, as well."""
    tensors = inputs(tokens=150, keys=150, dtype=FP64)
    upper = torch.randn(2, 6, 150, 16, dtype=FP64)
    got, want = (run(f, tensors, upper, is_causal=True) for f in (prefix_attention, joined))
    for ours, true in zip(got, want, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-13)
