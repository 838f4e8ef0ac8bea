"""dora_norm against its definition in float64, on every backend; merged weights."""

import itertools

import pytest
import torch
from backends import TRITON, simulated
from lora_cases import WEIGHTS
from tolerance import assert_close
from torch._subclasses.fake_tensor import FakeTensorMode

from fusetune import ops
from fusetune.ops._weight import flatten
from fusetune.reference import merge_lora as reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# N, K, r, weight, its dtype and the adapters'. The fourth has no words of codes within rows.
CASES = (
    (37, 264, 5, "nf4", F32, F32),
    (64, 128, 16, "fp4 nested", F32, BF16),
    (17, 520, 33, "nf4", F32, F16),
    (9, 101, 4, "nf4", F32, F32),
    (50, 101, 20, "dense", BF16, F32),
    (3, 48, 1, "dense", F16, F16),
    (0, 64, 2, "dense", F32, F32),
)


def make(n, k, r, kind, dtype, adapter):
    weight = WEIGHTS[kind](torch.randn(n, k).to(dtype))
    return weight, torch.randn(r, k).to(adapter) / k**0.5, torch.randn(n, r).to(adapter)


def exact(weight, a, b, scaling):
    return reference.merged(weight, a, b, scaling, torch.float64)


@pytest.mark.parametrize(
    ("backend", "case"), [*itertools.product(("reference", *TRITON), CASES)], indirect=["backend"]
)
def test_norms(backend, case):
    weight, a, b = make(*case)
    got = ops.dora_norm(weight, a, b, 0.7)
    expected = exact(weight, a, b, 0.7).norm(dim=1)
    eager = reference.merged(weight, a, b, 0.7, F32).norm(dim=1)
    assert_close("norm", got, expected, eager)


def test_merging_in_the_same_pass_rounds_once():
    with simulated("triton-sim") as run:
        from fusetune._triton.dora_norm import launch_dora_norm
        from fusetune.ops import _triton

        weight, a, b = make(40, 136, 16, "fp4 nested", F32, F32)
        norm, merged = torch.full((40,), torch.nan), torch.full((40, 136), torch.nan, dtype=BF16)
        launch_dora_norm(_triton.packed(weight), a, b, 0.7, norm, merged)
        assert len(run.launches) == 1
    expected = exact(weight, a, b, 0.7)
    # One rounding to bf16 of a value that fp32 sums have moved by a few of their own.
    allowed = expected.abs() * torch.finfo(BF16).eps / 2 + 2**-20
    assert ((merged.double() - expected).abs() <= allowed).all()
    assert_close("norm", norm, expected.norm(dim=1), expected.float().norm(dim=1))


def test_no_gradient_and_no_memory():
    weight, a, b = make(9, 64, 4, "dense", F32, F32)
    assert not ops.dora_norm(weight, a.requires_grad_(), b, 1.0).requires_grad
    tensors = weight, a.detach(), b
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in tensors]
        assert ops.dora_norm(*fake, 1.0).shape == (9,)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_opcheck(kind):
    weight, a, b = make(9, 64, 4, kind, F32, F32)
    torch.library.opcheck(torch.ops.fusetune.dora_norm.default, (*flatten(weight), a, b, 0.5))


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"weight": "W"}, TypeError, "weight"),
        ({"weight": torch.zeros(4)}, ValueError, "weight"),
        ({"weight": torch.zeros(4, 8, dtype=torch.int32)}, TypeError, "weight"),
        ({"lora_A": torch.zeros(2, 7)}, ValueError, "lora_A"),
        ({"lora_B": torch.zeros(4, 3)}, ValueError, "lora_B"),
        ({"lora_A": torch.zeros(2, 8, device="meta")}, ValueError, "meta"),
    ],
)
def test_bad_arguments(change, error, names):
    good = {
        "weight": torch.zeros(4, 8),
        "lora_A": torch.zeros(2, 8),
        "lora_B": torch.zeros(4, 2),
        "scaling": 1.0,
    }
    with pytest.raises(error, match=names):
        ops.dora_norm(**(good | change))
