"""prompt_embed by Triton, simulated: slots, prompts of rows, bytes, reasons."""

import pytest
import torch
from backends import TRITON, simulated
from tolerance import assert_same

from fusetune import ops
from fusetune.ops import _triton
from fusetune.ops._registry import OPS, Case

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
V = 50


def tensors(h, dtype, prompt=F32, groups=1, count=5, vocabulary=V):
    """weight, of every other row of a tensor, and prompts."""
    weight = torch.randn(2 * vocabulary, h).to(dtype)[::2]
    return weight, torch.randn(groups, count, h).to(prompt)


def results(ids, weight, prompt, dout, **options):
    prompt = prompt.detach().requires_grad_()
    out = ops.prompt_embed(ids, weight, prompt, **options)
    return out.detach(), torch.autograd.grad(out, prompt, dout.to(out.dtype))[0]


def check(ids, weight, prompt, **options):
    """The result bit for bit; the gradient against that of float64."""
    b, t = ids.shape
    dout = torch.randn(b, prompt.shape[1] + t, weight.shape[1]).to(weight.dtype)
    out, grad = results(ids, weight, prompt, dout, **options)
    with ops.use_backend("reference"):
        expected, _ = results(ids, weight, prompt, dout, **options)
        _, exact = results(ids, weight.double(), prompt.double(), dout, **options)
    assert torch.equal(out, expected)
    assert_same(grad, exact)


@pytest.mark.parametrize("backend", TRITON, indirect=True)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("h", [1, 40, 520])
def test_in_front(backend, dtype, h):
    check(torch.randint(V, (3, 4)), *tensors(h, dtype), scale=h**0.5)


@pytest.mark.parametrize("backend", TRITON, indirect=True)
def test_slots(backend):
    ids, (weight, prompt) = torch.randint(V, (3, 4)), tensors(40, F32)
    check(ids, weight, prompt, positions=torch.tensor([0, 2, 3, 7, 8]))
    each = torch.stack([torch.randperm(9)[:5].sort().values for _ in range(3)])
    check(ids, weight, prompt, positions=each)
    weight, prompt = tensors(8, BF16, BF16, count=70)
    check(ids, weight, prompt, positions=torch.arange(70) + (torch.arange(70) > 33))


@pytest.mark.parametrize("backend", TRITON, indirect=True)
def test_prompts_of_rows(backend):
    ids, rows = torch.randint(V, (4, 3)), torch.tensor([2, -1, 0, 2])
    check(ids, *tensors(40, F32, groups=3), rows=rows)
    check(ids, *tensors(40, BF16, groups=3), rows=rows, positions=torch.tensor([1, 2, 4, 5, 7]))


def test_nothing_to_do():
    with simulated("triton-sim") as sim:
        check(torch.randint(V, (0, 3)), *tensors(8, F32))
        check(torch.randint(V, (2, 3)), *tensors(8, F32, count=0))
        check(torch.randint(V, (2, 0)), *tensors(8, F32))
    kernels = [launch.kernel for launch in sim.launches]
    # No batch: zeros are the sum. No prompt: nothing to sum.
    assert kernels == ["_dprompt", "_prompt_embed", "_prompt_embed", "_dprompt"]


def test_tokens_that_are_not_in_the_vocabulary_give_nan():
    """Where their values cannot be looked at first, on a card."""
    weight, prompt = tensors(8, F32, count=1)
    ids = torch.tensor([[V, 1, -1]])
    with simulated("triton-sim"):
        run = OPS["prompt_embed"].run("cpu", F32, F32)
        out = run(ids, weight, prompt, None, None, 1.0)
    assert out.isnan().all(-1).tolist() == [[False, True, False, True]]
    assert out.isnan().any(-1).tolist() == [[False, True, False, True]]


def test_every_byte_moves_once():
    b, t, p, h = 4, 24, 8, 1024
    ids, (weight, prompt) = torch.randint(V, (b, t)), tensors(h, BF16, BF16, count=p)
    dout = torch.randn(b, p + t, h).to(BF16)
    with simulated("triton-sim") as sim:
        results(ids, weight, prompt, dout)
    forward, backward = (launch.counts for launch in sim.launches)
    moved = b * (p + t) * h * 2
    # A program has four places and a column block: ids are a sector for each.
    assert moved <= 32 * forward.global_load_sectors <= 1.05 * moved
    assert 32 * forward.global_store_sectors == moved
    assert 32 * backward.global_load_sectors == b * p * h * 2
    assert 32 * backward.global_store_sectors == p * h * 4
    opcodes = {op for launch in sim.launches for op in launch.counts.instructions}
    assert not [op for op in opcodes if op.startswith(("atom", "red"))]


def test_reasons(monkeypatch):
    with simulated("triton-sim"), ops.use_backend("auto"):
        for op in ("prompt_embed", "prompt_embed_dprompt"):
            assert OPS[op].select(Case("cpu", BF16, None)).name == "triton"
            reasons = dict(OPS[op].explain(Case("cpu", torch.float64, None)))
            assert "float64" in reasons["triton"]
            monkeypatch.setattr(_triton, "capability", lambda device=None: 75)
            assert "sm_75" in dict(OPS[op].explain(Case("cpu", BF16, None)))["triton"]
            monkeypatch.undo()
