"""prompt_embed: torch.library, torch.compile, and what bad arguments are told."""

import pytest
import torch

from fusetune.ops import extend_labels, extend_mask, prompt_embed

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    ids = torch.randint(9, (2, 3))
    weight = torch.randn(9, 5).to(dtype).requires_grad_()
    prompt = torch.randn(3, 2, 5, requires_grad=True)
    slots, rows = torch.tensor([[0, 3]]), torch.tensor([2, -1])
    check, ops = torch.library.opcheck, torch.ops.fusetune
    check(ops.prompt_embed.default, (ids, weight, prompt, slots, rows, 2.0, 4))
    check(ops.prompt_embed.default, (ids, weight, prompt, None, None, 1.0, -1))
    dout = torch.randn(2, 5, 5).to(dtype)
    check(ops.prompt_embed_dprompt.default, (dout, slots, rows, 3, 2))
    check(ops.prompt_embed_dprompt.default, (dout, None, None, 1, 2))
    check(ops.prompt_embed_dweight.default, (dout, ids, slots, 9, 2.0, 4))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("positions", [None, torch.tensor([1, 4])], ids=["front", "slots"])
def test_compiled_equals_eager(positions):
    weight, prompt = torch.randn(9, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    mask = torch.ones(3, 4, dtype=torch.int64)

    def function(ids, weight, prompt):
        out = prompt_embed(ids, weight, prompt, positions=positions, scale=2.0, padding_idx=0)
        seen = extend_mask(mask[:, : ids.shape[1]], 2, positions=positions)
        return out * seen[..., None], extend_labels(ids, 2, positions=positions)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for tokens in (4, 3):  # another length, and with it symbolic shapes
        ids = torch.randint(9, (3, tokens))
        got, want = (f(ids, weight, prompt) for f in (compiled, function))
        torch.testing.assert_close(got, want)
        upper = torch.randn_like(want[0])
        grads = [torch.autograd.grad(out[0], (weight, prompt), upper) for out in (got, want)]
        torch.testing.assert_close(*grads)


def test_on_the_meta_device():
    ids = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    weight, prompt = torch.randn(9, 5, device="meta"), torch.randn(4, 5, device="meta")
    out = prompt_embed(ids, weight.half(), prompt)
    assert (out.shape, out.dtype, out.device.type) == ((2, 7, 5), torch.float16, "meta")


GOOD = {
    "input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]),
    "weight": torch.randn(9, 5),
    "prompt": torch.randn(2, 5),
}
MANY = torch.randn(3, 2, 5)
BAD = [
    ({"input_ids": torch.ones(2, 3)}, TypeError, "input_ids must be an int64 or int32"),
    ({"input_ids": [[1]]}, TypeError, "input_ids must be an int64 or int32 tensor, got list"),
    ({"input_ids": torch.tensor([1, 2])}, ValueError, r"input_ids must have shape \[B, T\]"),
    ({"input_ids": torch.tensor([[1, 9]])}, ValueError, r"input_ids\[0, 1\] is 9, not in \[0, 9\)"),
    ({"input_ids": torch.tensor([[1], [-1]])}, ValueError, r"input_ids\[1, 0\] is -1"),
    ({"weight": torch.ones(9, 5, dtype=torch.int64)}, TypeError, "weight must be float16"),
    ({"weight": torch.randn(9)}, ValueError, r"weight must have shape \[V, H\]"),
    ({"weight": torch.randn(9, 0)}, ValueError, r"weight must have shape \[V, H\] with H > 0"),
    ({"weight": torch.randn(9, 5, device="meta")}, ValueError, "input_ids is on cpu, not on meta"),
    ({"prompt": None}, TypeError, "prompt must be a tensor, got NoneType"),
    ({"prompt": torch.randn(2, 4)}, ValueError, r"prompt must have shape \[P, 5\] or \[G, P, 5\]"),
    ({"prompt": torch.randn(0, 2, 5)}, ValueError, "prompt must hold at least one prompt"),
    ({"prompt": torch.randn(2, 5, device="meta")}, ValueError, "prompt is on meta, not on cpu"),
    ({"prompt": MANY}, ValueError, "rows must say which of the 3 prompts"),
    ({"prompt": MANY, "rows": [0, 1]}, TypeError, "rows must be an int64 tensor, got list"),
    ({"prompt": MANY, "rows": torch.tensor([0])}, ValueError, r"rows must have shape \(2,\)"),
    ({"prompt": MANY, "rows": torch.tensor([0, 3])}, ValueError, r"rows must be in \[-1, 3\)"),
    ({"prompt": MANY, "rows": torch.tensor([-2, 0])}, ValueError, r"values in \[-2, 0\]"),
    ({"positions": torch.tensor([0.0, 1.0])}, TypeError, "positions must be an int64 tensor"),
    ({"positions": torch.tensor([0])}, ValueError, r"positions must have shape \[2\] or \[2, 2\]"),
    ({"positions": torch.tensor([1, 1])}, ValueError, "positions must be strictly increasing"),
    ({"positions": torch.tensor([1, 5])}, ValueError, r"in \[0, 5\), got \[1, 5\]"),
    ({"positions": torch.tensor([-1, 1])}, ValueError, "positions must be strictly increasing"),
    ({"padding_idx": 9}, ValueError, r"padding_idx must be in \[-9, 9\), got 9"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[case[2] for case in BAD])
def test_bad_arguments(backend, change, error, message):
    with pytest.raises(error, match=message):
        prompt_embed(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: extend_mask([[1]], 2), TypeError, "attention_mask must be a tensor, got list"),
        (lambda: extend_mask(torch.ones(2), 2), ValueError, "attention_mask must have shape"),
        (lambda: extend_labels(torch.ones(2, 1, 1), 2), ValueError, "labels must have shape"),
        (lambda: extend_labels(torch.ones(2, 1), -1), ValueError, "length must not be negative"),
        (
            lambda: extend_mask(torch.ones(2, 1), 1, lengths=torch.tensor([1])),
            ValueError,
            r"lengths must have shape \(2,\)",
        ),
        (
            lambda: extend_mask(
                torch.ones(1, 1), 1, lengths=torch.tensor([1]), positions=torch.tensor([0])
            ),
            ValueError,
            "lengths cannot be given together",
        ),
        (
            lambda: extend_labels(torch.ones(1, 1), 1, positions=torch.tensor([2])),
            ValueError,
            "positions must be strictly increasing",
        ),
    ],
)
def test_bad_arguments_of_mask_and_labels(call, error, message):
    with pytest.raises(error, match=message):
        call()
