"""merge_lora against its definition in float64, on every backend: rounded once."""

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

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
# N, K, r, weight, its dtype, the adapters', the result's. The fourth has no words of codes within
# rows.
CASES = (
    (37, 264, 5, "nf4", F32, F32, BF16),
    (64, 128, 16, "fp4 nested", F32, BF16, F16),
    (17, 520, 33, "nf4", F32, F16, F32),
    (9, 101, 4, "nf4", F32, F32, BF16),
    (50, 101, 20, "dense", BF16, F32, BF16),
    (3, 48, 1, "dense", F16, F16, F32),
    (5, 40, 2, "dense", F64, F32, F32),
    (0, 64, 2, "dense", F32, F32, F16),
    (6, 16, 0, "dense", F32, F32, F16),
)


def make(n, k, r, kind, dtype, adapter, out=None):
    weight = WEIGHTS[kind](torch.randn(n, k).to(dtype))
    return weight, (torch.randn(r, k) / k**0.5).to(adapter), torch.randn(n, r).to(adapter)


def exact(weight, a, b, scaling):
    return reference.merged(weight, a, b, scaling, F64)


@pytest.mark.parametrize(
    ("backend", "case"),
    [*itertools.product(("reference", "cpu", *TRITON), CASES)],
    indirect=["backend"],
)
def test_values(backend, case):
    if case[4] == F64 and backend != "reference":
        pytest.skip("float64 has the reference alone")
    weight, a, b = make(*case)
    before = weight.clone() if isinstance(weight, torch.Tensor) else weight.packed.clone()
    got = ops.merge_lora(weight, a, b, 0.7, case[-1])
    magnitude = exact(weight, a, b, 0.7).abs() + 0.7 * (b.double().abs() @ a.double().abs())
    expected = exact(weight, a, b, 0.7)
    assert_close("merged", got, expected, expected.to(case[-1]), magnitude)
    assert torch.equal(before, weight if isinstance(weight, torch.Tensor) else weight.packed)


@pytest.mark.parametrize("name", ["cpu", "triton-sim", "triton-sim on sm_75"])
def test_rounds_once(name):
    """Nowhere further from the exact sum than half a spacing of bf16, and what fp32 loses."""
    weight, a, b = make(40, 136, 16, "fp4 nested", F32, F16)
    if name == "cpu":
        got = ops.merge_lora(weight, a, b, 0.7, BF16)
    else:
        with simulated("triton-sim", 75 if name.endswith("75") else 80) as run:
            dtype = F16 if name.endswith("75") else BF16
            got = ops.merge_lora(weight, a, b, 0.7, dtype)
            assert [launch.kernel for launch in run.launches] == ["_dequantize_rows"]
    expected = exact(weight, a, b, 0.7)
    allowed = expected.abs() * torch.finfo(got.dtype).eps / 2 + 2**-20
    assert ((got.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("name", ["cpu", "triton-sim"])
@pytest.mark.parametrize("view", ["transposed", "padded"])
def test_strides(name, view):
    weight, a, b = make(24, 40, 3, "dense", F32, F32)
    strided = (
        weight.T.contiguous().T if view == "transposed" else torch.cat([weight] * 2, 1)[:, :40]
    )
    a, b = a.T.contiguous().T, b.T.contiguous().T
    with simulated("triton-sim") if name == "triton-sim" else ops.use_backend("cpu"):
        got = ops.merge_lora(strided, a, b, 2.0)
    expected = exact(weight, a, b, 2.0)
    assert got.is_contiguous()
    assert_close("merged", got, expected, reference.merged(weight, a, b, 2.0, F32))


def test_equals_the_layer_with_its_adapter():
    weight, a, b = make(24, 64, 4, "nf4", F32, F32)
    x = torch.randn(5, 64)
    y = ops.lora_linear(x, weight, a, b, 1.5)
    torch.testing.assert_close(x @ ops.merge_lora(weight, a, b, 1.5).T, y, rtol=1e-5, atol=1e-5)


def test_default_dtype_gradient_and_memory():
    weight, a, b = make(9, 64, 4, "dense", BF16, F32)
    merged = ops.merge_lora(weight.requires_grad_(), a.requires_grad_(), b, 1.0)
    assert merged.dtype == BF16
    assert not merged.requires_grad
    tensors = weight.detach(), a.detach(), b
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in tensors]
        merged = ops.merge_lora(*fake, 1.0, F16)
        assert (merged.shape, merged.dtype) == ((9, 64), F16)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_opcheck(kind):
    weight, a, b = make(9, 64, 4, kind, F32, F32)
    arguments = (*flatten(weight), a, b, 0.5, BF16)
    torch.library.opcheck(torch.ops.fusetune.merge_lora.default, arguments)


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"weight": "W"}, TypeError, "weight"),
        ({"weight": torch.zeros(4)}, ValueError, "weight"),
        ({"weight": torch.zeros(4, 8, dtype=torch.int32)}, TypeError, "weight"),
        ({"lora_A": torch.zeros(2, 7)}, ValueError, "lora_A"),
        ({"lora_B": torch.zeros(4, 3)}, ValueError, "lora_B"),
        ({"lora_A": torch.zeros(2, 8, device="meta")}, ValueError, "meta"),
        ({"dtype": torch.int32}, TypeError, "dtype"),
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
        ops.merge_lora(**(good | change))
