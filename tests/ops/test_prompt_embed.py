"""prompt_embed against explicit concatenation, and its gradients against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusetune import _native
from fusetune.ops import _prompt_embed, extend_labels, extend_mask, prompt_embed, set_isa
from fusetune.ops import use_backend as backend_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = _native.C.available_isas() if _native.C else []
EPS32 = torch.finfo(torch.float32).eps


def joined(input_ids, weight, prompt, positions=None, rows=None, scale=1.0):
    """Vector by vector, as the words of the definition have it."""
    groups = prompt if prompt.dim() == 3 else prompt[None]
    batch, tokens = input_ids.shape
    length = groups.shape[1]
    sequences = []
    for b in range(batch):
        group = 0 if rows is None else int(rows[b])
        first = groups[group] if group >= 0 else torch.zeros_like(groups[0])
        slots = range(length) if positions is None else positions.expand(batch, -1)[b].tolist()
        rest = iter(input_ids[b].tolist())
        slots = {slot: j for j, slot in enumerate(slots)}
        vectors = []
        for place in range(length + tokens):
            if place in slots:
                vectors.append(first[slots[place]].to(weight.dtype))
            else:
                vectors.append((weight[next(rest)] * scale).to(weight.dtype))
        sequences.append(torch.stack(vectors) if vectors else weight.new_zeros(0, weight.shape[1]))
    return (
        torch.stack(sequences)
        if sequences
        else weight.new_zeros(0, length + tokens, *weight[0].shape)
    )


def inputs(b, t, p, h, dtype=torch.float32, prompt_dtype=None, groups=None, vocabulary=11):
    shape = (p, h) if groups is None else (groups, p, h)
    return {
        "input_ids": torch.randint(vocabulary, (b, t)),
        "weight": torch.randn(vocabulary, h).to(dtype).requires_grad_(),
        "prompt": torch.randn(shape).to(prompt_dtype or dtype).requires_grad_(),
    }


def gradients(out, tensors, upper):
    return torch.autograd.grad(out, (tensors["weight"], tensors["prompt"]), upper)


def exact_gradients(tensors, upper, options):
    wide = {k: tensors[k].detach().double().requires_grad_() for k in ("weight", "prompt")}
    out = joined(tensors["input_ids"], **wide, **options)
    nothing = 0 * sum(t.sum() for t in wide.values())  # so that both are in the graph
    return [g.clone() for g in gradients(out + nothing, wide, upper.double())]


def check(tensors, **options):
    """The result to the bit; gradients within the roundings of an fp32 sum and of their dtype."""
    got = prompt_embed(**tensors, **options)
    padding = options.pop("padding_idx", None)
    want = joined(**tensors, **options)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)
    upper = torch.randn_like(want)
    true, sizes = (exact_gradients(tensors, u, options) for u in (upper, upper.abs()))
    if padding is not None:
        true[0][padding] = sizes[0][padding] = 0
    terms = max(1, want.shape[0] * want.shape[1])  # of a sum, at most
    for name, ours, one, size in zip(
        ("weight", "prompt"), gradients(got, tensors, upper), true, sizes, strict=True
    ):
        assert ours.dtype == tensors[name].dtype
        assert ours.shape == one.shape
        eps = torch.finfo(ours.dtype).eps
        allowed = terms * EPS32 * size.abs() + eps / 2 * one.abs() + torch.finfo(ours.dtype).tiny
        assert ((ours.double() - one).abs() <= allowed).all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prompt_dtype", [None, torch.float32], ids=["same", "fp32"])
@pytest.mark.parametrize("scale", [1.0, 11.3125])
def test_in_front(backend, dtype, prompt_dtype, scale):
    for b, t, p, h in ((3, 5, 4, 24), (8, 17, 20, 67), (1, 1, 1, 1)):
        check(inputs(b, t, p, h, dtype, prompt_dtype), scale=scale)


@pytest.mark.parametrize(
    ("b", "t", "p"), [(3, 5, 0), (3, 0, 4), (0, 5, 4), (2, 0, 0)], ids=["P=0", "T=0", "B=0", "none"]
)
def test_nothing_of_a_kind(backend, b, t, p):
    check(inputs(b, t, p, 9))
    check(inputs(b, t, p, 9, groups=2), rows=torch.arange(b) % 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interleaved(backend, dtype):
    tensors = inputs(3, 6, 4, 24, dtype)
    for places in ([0, 1, 2, 3], [6, 7, 8, 9], [0, 3, 4, 9], [2, 4, 6, 8]):
        check(tensors, positions=torch.tensor(places))
    check(tensors, positions=torch.tensor([[0, 1, 2, 3], [1, 4, 8, 9], [2, 3, 6, 7]]), scale=0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(backend, dtype):
    """Which of three prompts each has; one has none, one is nobody's."""
    tensors = inputs(5, 6, 4, 24, dtype, torch.float32, groups=3)
    check(tensors, rows=torch.tensor([2, 0, -1, 2, 2]))
    check(tensors, rows=torch.tensor([2, 0, -1, 2, 2]), positions=torch.tensor([1, 2, 5, 9]))
    out = prompt_embed(**tensors, rows=torch.tensor([2, 0, -1, 2, 2]))
    assert out[2, :4].eq(0).all()
    grad = gradients(out, tensors, torch.ones_like(out))[1]
    assert grad[1].eq(0).all()
    assert grad[2].eq(3).all()


@pytest.mark.parametrize("padding_idx", [0, 5, -1, -11])
def test_padding_has_no_gradient(backend, padding_idx):
    tensors = inputs(4, 30, 2, 8)
    check(tensors, padding_idx=padding_idx)
    out = prompt_embed(**tensors, padding_idx=padding_idx)
    dweight = gradients(out, tensors, torch.ones_like(out))[0]
    assert dweight[padding_idx].eq(0).all()
    assert dweight.any(1).sum() == 10  # every other token is there


def test_a_token_met_often(backend):
    """A sum in fp32, rounded once, where torch rounds 400 times."""
    tensors = inputs(4, 100, 1, 8, torch.bfloat16)
    tensors["input_ids"] = torch.full((4, 100), 3)
    check(tensors)


def test_only_what_needs_a_gradient(monkeypatch):
    def refuse(*_):
        raise AssertionError("a gradient that nobody needs")

    for frozen, gradient in (("weight", "_dweight"), ("prompt", "_dprompt")):
        tensors = inputs(2, 3, 2, 4)
        tensors[frozen].requires_grad_(False)
        with monkeypatch.context() as patch:
            patch.setattr(_prompt_embed, gradient, refuse)
            prompt_embed(**tensors).sum().backward()
        with torch.no_grad():
            assert not prompt_embed(**tensors).requires_grad


def test_nothing_large_is_kept():
    tensors = inputs(2, 30, 20, 64)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks:
        out = prompt_embed(**tensors)
    assert [t.data_ptr() for t in kept] == [tensors["input_ids"].data_ptr()]
    with torch.no_grad():  # as with torch's own look-up
        tensors["weight"] += 1
    gradients(out, tensors, torch.ones_like(out))


def test_layouts(backend):
    """Views of every kind, int32 ids, an expanded prompt."""
    tensors = inputs(4, 6, 3, 10)
    want = prompt_embed(**tensors)
    weight, prompt = tensors["weight"], tensors["prompt"]
    views = {
        "input_ids": tensors["input_ids"].T.contiguous().T.int(),
        "weight": torch.cat((weight, weight), 1)[:, :10],
        "prompt": prompt.T.contiguous().T,
    }
    for name, view in views.items():
        assert torch.equal(prompt_embed(**{**tensors, name: view}), want), name
    column_major = weight.T.contiguous().T
    assert torch.equal(prompt_embed(tensors["input_ids"], column_major, prompt), want)
    repeated = prompt.expand(2, 3, 10)
    rows = torch.tensor([0, 1, 9, 9, 1, 9, 0, 9])[::2].clamp(max=1)
    assert torch.equal(prompt_embed(tensors["input_ids"], weight, repeated, rows=rows), want)
    upper = torch.randn(10, 9, 4).permute(2, 1, 0)
    got, also = (
        gradients(prompt_embed(**tensors), tensors, u) for u in (upper, upper.contiguous())
    )
    torch.testing.assert_close(got, also, rtol=0, atol=0)


def test_gradients_are_the_same_to_the_bit_on_any_number_of_threads():
    tensors = inputs(16, 50, 20, 130)
    upper = torch.randn(16, 70, 130)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gradients(prompt_embed(**tensors), tensors, upper))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.parametrize("options", [{}, {"positions": torch.tensor([1, 2, 5])}], ids=["", "slots"])
def test_gradcheck_in_float64(options):
    tensors = inputs(3, 4, 3, 2, torch.float64)

    def function(weight, prompt):
        return prompt_embed(tensors["input_ids"], weight, prompt, scale=1.5, **options)

    assert torch.autograd.gradcheck(function, (tensors["weight"], tensors["prompt"]))


@pytest.mark.skipif(_native.C is None, reason="no native module")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa, dtype):
    """Columns that leave a rest in every width of vectors."""
    before = _native.C.isa()
    set_isa(isa)
    try:
        with backend_of("cpu"):
            for h in (1, 3, 17, 33, 100):
                check(inputs(3, 5, 4, h, dtype, torch.float32), scale=3.5)
                check(
                    inputs(3, 5, 4, h, dtype, torch.bfloat16), positions=torch.tensor([0, 2, 5, 8])
                )
    finally:
        set_isa(before)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), b=st.integers(0, 5), t=st.integers(0, 9), p=st.integers(0, 9))
def test_any_layout(data, b, t, p):
    torch.manual_seed(b + t + p)
    places = st.sets(st.integers(0, max(0, p + t - 1)), min_size=p, max_size=p)
    options = {}
    if p and data.draw(st.booleans()):
        drawn = [sorted(data.draw(places)) for _ in range(b)]
        options["positions"] = torch.tensor(drawn, dtype=torch.int64).view(b, p)
    rows = st.lists(st.integers(-1, 2), min_size=b, max_size=b)
    options["rows"] = torch.tensor(data.draw(rows), dtype=torch.int64)
    check(inputs(b, t, p, 5, groups=3), **options)


def test_large_blocks_of_places(backend):
    """More than one block of a row, with a prompt that crosses their border."""
    check(inputs(2, 70, 40, 600))
    check(inputs(2, 70, 40, 600), positions=torch.arange(40) * 2 + 7)


# --- mask and labels ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_extend_mask(dtype):
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]]).to(dtype)
    got = extend_mask(mask, 2)
    assert got.dtype == dtype
    assert torch.equal(got, torch.cat((torch.ones(2, 2, dtype=dtype), mask), 1))
    lengths = torch.tensor([0, 1])
    first = torch.tensor([[0, 0], [0, 1]]).to(dtype)
    assert torch.equal(extend_mask(mask, 2, lengths=lengths), torch.cat((first, mask), 1))


def test_extend_at_positions():
    """Masks and labels follow the tokens to where prompt_embed puts them."""
    mask, labels = torch.tensor([[1, 1, 0]]), torch.tensor([[7, 8, 9]])
    positions = torch.tensor([0, 2])
    assert extend_mask(mask, 2, positions=positions).tolist() == [[1, 1, 1, 1, 0]]
    assert extend_labels(labels, 2, positions=positions).tolist() == [[-100, 7, -100, 8, 9]]
    weight = torch.arange(10.0)[:, None]
    out = prompt_embed(labels, weight, torch.full((2, 1), -100.0), positions=positions)
    assert torch.equal(out[..., 0].long(), extend_labels(labels, 2, positions=positions))
    each = torch.tensor([[0, 2], [3, 4]])
    both = extend_labels(labels.expand(2, -1), 2, positions=each, ignore_index=-1)
    assert both.tolist() == [[-1, 7, -1, 8, 9], [7, 8, 9, -1, -1]]


def test_extend_labels():
    labels = torch.tensor([[3, 4], [5, -100]])
    assert extend_labels(labels, 1).tolist() == [[-100, 3, 4], [-100, 5, -100]]
    assert extend_labels(labels, 0).equal(labels)
    assert extend_labels(labels[:0], 3).shape == (0, 5)


def test_the_core_does_not_keep_the_shape_of_the_prompt_by_mistake():
    """The gradient of a prompt that no row has, and of one in another dtype than the weight."""
    grad = _prompt_embed._dprompt(torch.ones(2, 3, 4), None, torch.tensor([-1, -1]), 2, 2)
    assert grad.shape == (2, 2, 4)
    assert grad.eq(0).all()
