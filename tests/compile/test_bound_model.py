"""What is predicted of a model's own parts: ledgers against torch, kernels' bytes by hand."""

import json

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton", reason="executes Triton kernels")

from benchmarks import bound_adapters, bound_model, readme, recorder
from benchmarks.bound_launch import ledger
from benchmarks.cards import CARDS
from benchmarks.ledgers_model import PARTS, Loss, Norm, Rotary
from fusetune.bench import rms_norm_cases, rotary_cases

BF16 = torch.bfloat16
A100 = next(card for card in CARDS if card.name == "A100")


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """Not here: that memory is filled would be counted."""


def norm(part):
    """(what torch computes, of which tensors)"""
    weight = torch.randn(part.n).to(BF16)
    x = torch.randn(part.m, part.n).to(BF16).requires_grad_()
    return lambda x: rms_norm_cases.expression(x, weight, 1e-5), [x]


def rotary(part):
    batch, *heads, tokens, dim = part
    both = [torch.randn(batch, tokens, h, dim).to(BF16).transpose(1, 2) for h in heads]
    cos, sin = torch.randn(2, batch, tokens, dim).to(BF16)
    return lambda *x: rotary_cases.expression(*x, cos, sin), [x.requires_grad_() for x in both]


def loss(part):
    target = torch.randint(part.v, (part.m,))
    logits = torch.randn(part.m, part.v).to(BF16).requires_grad_()
    return lambda x: functional.cross_entropy(x.float(), target), [logits]


CASES = [(Norm(48, 64), norm), (Rotary(2, 6, 2, 8, 16), rotary), (Loss(24, 64), loss)]


@pytest.mark.parametrize(("part", "make"), CASES)
def test_ledgers_are_what_torch_executes(part, make):
    """Operator for operator: as many, and the bytes of each but for its scalars."""
    (run, tensors), works = make(part), []
    upper = [torch.empty_like(t) for t in outputs(run(*tensors))]
    with recorder._Operators(works):
        torch.autograd.grad(outputs(run(*tensors)), tensors, upper)
    known = sorted(o.bytes for o in part.eager())
    assert sorted(w.memory for w in works) == pytest.approx(known, rel=0, abs=8)


def outputs(result):
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("part", [Norm(64, 512), Rotary(2, 6, 2, 8, 64), Loss(8, 8192)], ids=str)
def test_bytes_of_the_kernels(part):
    """A launch each way; what has to move, and a few numbers a row."""
    found = bound_model.launches(part, A100)
    assert len(found) == 2
    rows = {Norm: lambda p: 4 * p.m + 2 * p.n, Rotary: lambda p: 0, Loss: lambda p: 20 * p.m}
    for launch, least in zip(found, part.least(), strict=True):
        assert 0 <= launch.memory - least.bytes <= rows[type(part)](part)


STORED = json.loads(readme.PREDICTED.read_text())


def test_every_part_is_predicted_for_every_card():
    for card in CARDS:
        kept = STORED["cards"][card.name]["passes"]
        for part in PARTS:
            others = (ledger(of, card) for of in (part.eager(), part.least()))
            for name, known in zip(bound_adapters.OTHERS, others, strict=True):
                assert kept[part.name]["others"][name] == pytest.approx(known)
            moved = sum(launch["bytes"] for launch in kept[part.name]["launches"])
            assert 0.99 < moved / kept[part.name]["others"]["the least"]["bytes"] < 1.02
    assert "*predicted*" in bound_model.markdown(STORED)
