"""prefix_attention: torch.library, torch.compile, and what bad arguments are told."""

import pytest
import torch
from prefix_cases import NAMES, inputs

from fusetune.ops import prefix_attention

FP64 = torch.float64


def library_arguments(tensors, **changed):
    """Of torch.ops.fusetune.prefix_attention, in its order."""
    given = {
        "mask": None,
        "bias": None,
        "rows": None,
        "lengths": None,
        "seed": None,
        "causal": True,
        "scale": 0.5,
        "window": 0,
        "position": 0,
        "dropout_p": 0.0,
    }
    return *tensors.values(), *{**given, **changed}.values()


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"mask": torch.ones(9, 9, dtype=torch.bool).tril(), "causal": False, "window": 12},
        {"rows": torch.tensor([1, -1]), "lengths": torch.tensor([5, 3])},
        {"seed": torch.tensor([9]), "dropout_p": 0.3, "bias": torch.randn(1, 6, 9, 5)},
    ],
    ids=lambda changed: ",".join(changed) or "causal",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP64], ids=str)
def test_opcheck(dtype, changed):
    arguments = library_arguments(
        inputs(groups=2 if "rows" in changed else 1, dtype=dtype), **changed
    )
    torch.library.opcheck(torch.ops.fusetune.prefix_attention.default, arguments)
    tensors = [t.detach() for t in arguments[:5]]
    out, lse = torch.ops.fusetune.prefix_attention(*tensors, *arguments[5:])
    for needs in ([True] * 5, [True, False, False, True, True], [False] * 3 + [True] * 2):
        backward = (out, *tensors, out, lse, needs, *arguments[5:])
        torch.library.opcheck(torch.ops.fusetune.prefix_attention_backward.default, backward)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("layout", ["contiguous", "tokens first"])
@pytest.mark.parametrize("frozen", [(), ("query", "key", "value")], ids=["all", "prefix"])
def test_compiled_equals_eager(layout, frozen):
    tensors = inputs()
    for name in frozen:
        tensors[name].requires_grad_(False)
    leaves = list(tensors.values())

    def function(query, key, value, prefix_key, prefix_value):
        if layout == "tokens first":
            query, key, value = (
                x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)
            )
        out = prefix_attention(query, key, value, prefix_key, prefix_value, is_causal=True)
        return out.transpose(1, 2).reshape(2, 9, 96)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    got, want = (f(*leaves) for f in (compiled, function))
    torch.testing.assert_close(got, want)
    needed = [leaf for leaf in leaves if leaf.requires_grad]
    upper = torch.randn(2, 9, 96)
    grads = [torch.autograd.grad(out, needed, upper) for out in (got, want)]
    torch.testing.assert_close(*grads)


def test_under_autocast():
    """Tensors of the dtypes that autocast leaves: a bfloat16 query beside an fp32 prefix."""
    tensors = inputs(dtype=torch.bfloat16, prefix_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = prefix_attention(**tensors)
    assert out.equal(prefix_attention(**tensors))


GOOD = {name: t.detach() for name, t in inputs().items()}
META = torch.device("meta")
BAD = [
    ({"query": torch.ones(2, 6, 9, 16, dtype=torch.int64)}, TypeError, "query must be float16"),
    ({"query": torch.randn(2, 6, 16)}, ValueError, r"query must have shape \[B, Hq, T, D\]"),
    ({"query": torch.randn(2, 6, 9, 0)}, ValueError, "with D > 0"),
    ({"query": torch.randn(2, 5, 9, 16)}, ValueError, "multiple of key's, got 5 and 3"),
    ({"key": torch.randn(2, 3, 9, 8)}, ValueError, r"key must have shape \[2, Hkv, S, 16\]"),
    ({"key": torch.randn(1, 3, 9, 16)}, ValueError, r"key must have shape \[2, Hkv, S, 16\]"),
    ({"key": GOOD["key"].half()}, TypeError, "key must be torch.float32 as query is"),
    ({"value": torch.randn(2, 3, 8, 16)}, ValueError, r"value must have shape \(2, 3, 9, 16\)"),
    ({"value": None}, TypeError, "value must be a tensor, got NoneType"),
    ({"value": GOOD["value"].to(META)}, ValueError, "value is on meta"),
    ({"prefix_key": torch.randn(5, 2, 16)}, ValueError, r"got \[5, 2, 16\]"),
    ({"prefix_key": torch.randn(5, 48)}, ValueError, r"\[P, 3, 16\] or \[G, P, 3, 16\]"),
    ({"prefix_key": torch.randn(0, 5, 3, 16)}, ValueError, r"got \[0, 5, 3, 16\]"),
    ({"prefix_key": GOOD["prefix_key"].half()}, TypeError, "prefix_key must be torch.float32"),
    ({"prefix_value": torch.randn(4, 3, 16)}, ValueError, "prefix_value must have shape"),
    ({"prefix_value": None}, TypeError, "prefix_value must be a tensor"),
    ({"prefix_value": GOOD["prefix_value"].to(META)}, ValueError, "prefix_value is on meta"),
    ({"attn_mask": torch.ones(9, 9), "is_causal": True}, ValueError, "cannot both be given"),
    ({"attn_mask": torch.ones(9, 8)}, ValueError, r"attn_mask must broadcast to \[2, 6, 9, 9\]"),
    ({"attn_mask": torch.ones(9, 9, dtype=torch.int64)}, TypeError, "attn_mask must be float16"),
    ({"attn_mask": torch.ones(9, 9, device=META)}, ValueError, "attn_mask is on meta"),
    ({"attn_mask": torch.ones(9, requires_grad=True)}, ValueError, "attn_mask must not require"),
    ({"prefix_bias": torch.ones(9, 5)}, ValueError, "prefix_bias must have shape"),
    ({"prefix_bias": torch.ones(1, 1, 1, 5)}, ValueError, "prefix_bias must have shape"),
    ({"prefix_bias": torch.ones(1, 2, 9, 5)}, ValueError, "prefix_bias must broadcast"),
    (
        {"prefix_bias": torch.ones(1, 6, 9, 5, requires_grad=True)},
        ValueError,
        "prefix_bias must not require a gradient",
    ),
    ({"prefix_key": torch.randn(2, 5, 3, 16)}, ValueError, "prefix_value must have shape"),
    ({"rows": torch.tensor([0])}, ValueError, r"rows must have shape \(2,\)"),
    ({"rows": torch.tensor([0, 1])}, ValueError, "rows must hold values from -1 to 0, got 1"),
    ({"rows": torch.tensor([0, 0], dtype=torch.int32)}, TypeError, "rows must be int64"),
    ({"rows": [0, 0]}, TypeError, "rows must be a tensor, got list"),
    ({"lengths": torch.tensor([6])}, ValueError, "lengths must hold values from 0 to 5, got 6"),
    ({"lengths": torch.tensor([5, 5])}, ValueError, r"lengths must have shape \(1,\)"),
    ({"window": 0}, ValueError, "window must be positive"),
    ({"position": -1}, ValueError, "position must not be negative"),
    ({"prefix_dropout_p": 1.5}, ValueError, "prefix_dropout_p must be between 0 and 1"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[case[2] for case in BAD])
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        prefix_attention(**{**GOOD, **change})


def test_several_prefixes_need_rows():
    several = {name: GOOD[name].expand(2, -1, -1, -1) for name in NAMES[3:]}
    with pytest.raises(ValueError, match="rows must say which of the 2 prefixes"):
        prefix_attention(**{**GOOD, **several})


def test_float64_takes_no_narrower_prefix():
    wide = {name: t.double() for name, t in GOOD.items()}
    with pytest.raises(TypeError, match=r"prefix_key must be torch\.float64 as query is, got"):
        prefix_attention(**{**wide, "prefix_key": GOOD["prefix_key"]})


def test_a_bias_may_require_a_gradient_where_none_is_taken():
    bias = torch.ones(1, 6, 9, 5, requires_grad=True)
    with torch.no_grad():
        out = prefix_attention(**GOOD, prefix_bias=bias)
    assert out.equal(prefix_attention(**GOOD, prefix_bias=bias.detach()))
