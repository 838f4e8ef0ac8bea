"""attention against its definition in float64: gradients, masks, dropout; arguments, compiling."""

import pytest
import torch
from attention_cases import NAMES, compare, inputs, written_out
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fusetune import _native
from fusetune.ops import attention, set_isa, use_backend

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ISAS = _native.C.available_isas() if _native.C else []


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    if request.param == "cpu" and _native.C is None:
        pytest.skip(_native.reason)
    with use_backend(request.param):
        yield request.param


def padding(batch=2, keys=9):
    """Row 0 sees all, row 1 not its last 3 keys."""
    mask = torch.ones(batch, 1, 1, keys, dtype=torch.bool)
    mask[1, ..., -3:] = False
    return mask


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": padding()}], ids=str)
def test_output_and_gradients(backend, dtype, dropout_p, options):
    compare(inputs(dtype=dtype), dropout_p=dropout_p, **options)


@pytest.mark.parametrize(
    ("tokens", "keys"), [(1, 1), (1, 20), (7, 0), (0, 4), (5, 70), (47, 48), (130, 97)]
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_any_number_of_tokens_and_keys(backend, tokens, keys, is_causal):
    compare(inputs(tokens=tokens, keys=keys), is_causal=is_causal, dropout_p=0.3)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (9, 3), (8, 1)])
@pytest.mark.parametrize("dim", [1, 8, 20, 100])
def test_heads_of_any_size(backend, heads, kv_heads, dim):
    compare(inputs(heads=heads, kv_heads=kv_heads, dim=dim), scale=0.3, dropout_p=0.2)


@pytest.mark.parametrize("shape", [(9, 9), (9,), (6, 1, 9), (2, 1, 9, 9), (2, 6, 9, 1), ()])
@pytest.mark.parametrize("boolean", [False, True])
def test_masks(backend, shape, boolean):
    mask = torch.rand(shape) > 0.3 if boolean else torch.randn(shape)
    if boolean and shape == ():
        mask = torch.tensor(True)
    compare(inputs(), attn_mask=mask, dropout_p=0.2)


def test_queries_that_see_nothing_get_zeros(backend):
    mask = torch.ones(9, 9, dtype=torch.bool)
    mask[4] = False
    tensors = inputs()
    compare(tensors, attn_mask=mask, dropout_p=0.3)
    out = attention(**tensors, attn_mask=mask)
    assert out[:, :, 4].eq(0).all()
    (gradient,) = torch.autograd.grad(out.sum(), tensors["query"])
    assert gradient[:, :, 4].eq(0).all()
    assert gradient.isfinite().all()


def test_the_most_negative_mask(backend):
    """What many models add where nothing is to be seen; all of a row: its keys are equal."""
    lowest = torch.finfo(FP32).min
    mask = torch.zeros(9, 9).masked_fill_(torch.rand(9, 9) > 0.5, lowest)
    compare(inputs(), attn_mask=mask)
    mask[4] = lowest
    assert attention(**inputs(), attn_mask=mask).isfinite().all()


def test_very_unequal_scores(backend):
    tensors = inputs()
    with torch.no_grad():
        tensors["query"].mul_(300)
    compare(tensors, dropout_p=0.1)


@pytest.mark.parametrize("layout", ["tokens first", "expanded", "every other", "reversed"])
def test_strides(backend, layout):
    def laid_out(x):
        x = x.detach()
        if layout == "tokens first":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "expanded":
            x = x[:, :1].expand(x.shape)
        elif layout == "every other":
            x = torch.stack([x, -x], -1).flatten(-2)[..., ::2]
        else:
            x = x.mT.contiguous().mT
        return x.requires_grad_()

    compare({name: laid_out(t) for name, t in inputs().items()}, dropout_p=0.2)


def test_all_is_dropped(backend):
    tensors = inputs()
    out = attention(**tensors, dropout_p=1.0)
    assert out.eq(0).all()
    for gradient in torch.autograd.grad(out.sum(), list(tensors.values())):
        assert gradient.eq(0).all()


def test_expected_value(backend):
    """Over many masks the mean is the result without dropout: each mask is another one."""
    tensors = inputs(batch=1, heads=2, kv_heads=2, dim=4)
    without = attention(**tensors).detach()
    masks = torch.stack([attention(**tensors, dropout_p=0.4).detach() for _ in range(2000)])
    deviation = masks.std(0) / 2000**0.5
    assert ((masks.mean(0) - without).abs() < 5 * deviation).all()
    assert torch.equal(attention(**tensors, dropout_p=0.4, training=False), without)


def test_seed_from_torchs_generator(backend):
    tensors = inputs()
    torch.manual_seed(5)
    first, second = (attention(**tensors, dropout_p=0.3) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(attention(**tensors, dropout_p=0.3), first)
    assert not torch.equal(first, second)


@pytest.mark.skipif(_native.C is None, reason=str(_native.reason))
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    with use_backend("cpu"):
        set_isa(isa)
        try:
            compare(inputs(tokens=70, keys=70, dim=20), is_causal=True, dropout_p=0.3)
            compare(inputs(dtype=BF16, dim=32), attn_mask=padding(), dropout_p=0.3)
        finally:
            set_isa("auto")


@pytest.mark.skipif(_native.C is None, reason=str(_native.reason))
def test_the_same_bits_on_any_number_of_threads():
    tensors = inputs(tokens=200, keys=200)

    def results():
        torch.manual_seed(3)
        out = attention(**tensors, dropout_p=0.2)
        return out, *torch.autograd.grad(out.sum(), list(tensors.values()))

    threads = torch.get_num_threads()
    want = results()
    try:
        torch.set_num_threads(1)
        got = results()
    finally:
        torch.set_num_threads(threads)
    for name, one, other in zip(("out", *NAMES), want, got, strict=True):
        assert torch.equal(one, other), name


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(0, 60),
    st.integers(0, 60), st.integers(1, 40), st.booleans(), st.sampled_from([0.0, 0.3]),
)  # fmt: skip
def test_any_shape(batch, kv_heads, group, tokens, keys, dim, is_causal, dropout_p):
    shape = {"batch": batch, "kv_heads": kv_heads, "heads": kv_heads * group, "dim": dim}
    compare(inputs(**shape, tokens=tokens, keys=keys), is_causal=is_causal, dropout_p=dropout_p)


def test_it_is_torchs_attention():
    tensors = inputs(kv_heads=6)
    want = functional.scaled_dot_product_attention(**tensors, is_causal=True)
    torch.testing.assert_close(attention(**tensors, is_causal=True), want)


def test_gradcheck():
    tensors = inputs(batch=1, heads=2, kv_heads=1, tokens=4, keys=5, dim=3, dtype=FP64)

    def function(*given):
        torch.manual_seed(3)
        return attention(*given, dropout_p=0.3)

    assert torch.autograd.gradcheck(function, list(tensors.values()))


def test_not_differentiable_twice():
    tensors, factor = inputs(), torch.ones(1, requires_grad=True)
    total = (factor * attention(**tensors)).sum()
    (gradient,) = torch.autograd.grad(total, tensors["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --- torch.library, compiling ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
@pytest.mark.parametrize("seed", [None, torch.tensor([9])], ids=["all", "dropout"])
def test_opcheck(dtype, seed):
    tensors = list(inputs(dtype=dtype).values())
    options = (padding(), False, 0.5, 0.0 if seed is None else 0.3, seed)
    torch.library.opcheck(torch.ops.fusetune.attention.default, (*tensors, *options))
    tensors = [t.detach() for t in tensors]
    out, lse = torch.ops.fusetune.attention(*tensors, *options)
    backward = (out, *tensors, out, lse, *options)
    torch.library.opcheck(torch.ops.fusetune.attention_backward.default, backward)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_equals_eager():
    tensors = inputs()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    results = [function(**tensors, is_causal=True) for function in (compiled, attention)]
    torch.testing.assert_close(*results)
    upper = torch.randn(results[0].shape)
    leaves = list(tensors.values())
    torch.testing.assert_close(*(torch.autograd.grad(out, leaves, upper) for out in results))


def test_written_out_is_what_it_is_compared_with():
    tensors = inputs(kv_heads=6)
    want = functional.scaled_dot_product_attention(**tensors, attn_mask=padding())
    torch.testing.assert_close(written_out(**tensors, attn_mask=padding()), want)


# --- bad arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"query": torch.ones(2, 6, 9, 16, dtype=torch.int64)}, TypeError, "query must be float16"),
        ({"query": torch.ones(6, 9, 16)}, ValueError, r"query must have shape \[B, Hq, T, D\]"),
        ({"key": torch.ones(2, 3, 9, 8)}, ValueError, r"key must have shape \[2, Hkv, S, 16\]"),
        ({"key": torch.ones(2, 4, 9, 16)}, ValueError, "heads must be a multiple"),
        ({"value": torch.ones(2, 3, 8, 16)}, ValueError, "value must have shape"),
        ({"value": torch.ones(2, 3, 9, 16, dtype=FP16)}, TypeError, "value must be torch.float32"),
        ({"attn_mask": torch.ones(9, 8)}, ValueError, "attn_mask must broadcast"),
        ({"attn_mask": torch.ones(9, 9, dtype=torch.int64)}, TypeError, "attn_mask must be float"),
        ({"attn_mask": torch.ones(9), "is_causal": True}, ValueError, "cannot both be given"),
        (
            {"attn_mask": torch.ones(9, requires_grad=True)},
            ValueError,
            "attn_mask must not require",
        ),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must be from 0 to 1, got 1.5"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p must be from 0 to 1, got nan"),
    ],
)
def test_bad_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        attention(**{**inputs(), **changed})
