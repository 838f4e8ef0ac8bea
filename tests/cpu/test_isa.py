"""Choice of the instruction set: each gives what `scalar` gives, FUSETUNE_CPU_ISA forces one, and
a name that is not available, or a package without the native module, is told and not hidden.
"""

import pytest
import torch

from fusetune import QuantizedWeight, _native, ops
from fusetune.ops import _cpu

C = _native.C
needs_native = pytest.mark.skipif(C is None, reason=str(_native.reason))
ISAS = C.available_isas() if C else []


@pytest.fixture
def isa_restored():
    before = C.isa()
    yield
    _cpu.set_isa(before)


def results(x, weight, dtype) -> dict[str, torch.Tensor]:
    """What the ops give, forward and backward, in the instruction set in use."""
    with ops.use_backend("cpu"):
        quantized = ops.quantize_4bit(weight, double_quant=True)
        leaf = x.to(dtype).requires_grad_()
        a = torch.linspace(-1, 1, 5 * x.shape[1]).view(5, -1).requires_grad_()
        b = torch.linspace(-1, 1, 5 * weight.shape[0]).view(-1, 5).requires_grad_()
        torch.manual_seed(2)
        y = ops.lora_linear(leaf, quantized, a, b, 0.5, dropout_p=0.25)
        dense = ops.lora_linear(leaf, weight.to(dtype), a, b, 0.5)
        dy = torch.linspace(-1, 1, y.numel()).view_as(y).to(dtype)
        torch.autograd.backward([y, dense], [dy, dy])
        return {
            "packed": quantized.packed,
            "dequantised": ops.dequantize_4bit(quantized, dtype),
            "y": y.detach(),
            "dense y": dense.detach(),
            "dx": leaf.grad,
            "dA": a.grad,
            "dB": b.grad,
        }


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 9, 70])
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "scalar"])
def test_equals_scalar(isa_restored, isa, rows, dtype):
    x, weight = torch.randn(rows, 192), torch.randn(130, 192)
    _cpu.set_isa("scalar")
    expected = results(x, weight, dtype)
    _cpu.set_isa(isa)
    assert C.isa() == isa
    got = results(x, weight, dtype)
    for name in ("packed", "dequantised"):
        assert torch.equal(got.pop(name), expected.pop(name)), name
    for name, value in expected.items():
        # Both sum up to 192 products in fp32, in another order: some roundings of the largest
        # element. A result in another dtype is rounded to it twice, per weight and in their sum.
        rounding = 0 if value.dtype == torch.float32 else 2 * torch.finfo(value.dtype).eps
        bound = (32 * 2**-24 + rounding) * value.abs().max().item()
        difference = (got[name].double() - value.double()).abs().max().item()
        assert difference <= bound, f"{name}: {difference} > {bound}"


@needs_native
def test_best_comes_first():
    assert ISAS[-1] == "scalar"
    assert (
        sorted(ISAS, key=["amx", "avx512_bf16", "avx512", "avx2", "neon", "scalar"].index) == ISAS
    )
    for isa in ("amx", "avx512_bf16", "avx512", "avx2", "neon", "scalar"):
        reason = C.isa_unavailable_reason(isa)
        assert (reason is None) == (isa in ISAS), (isa, reason)


@needs_native
def test_set_isa_refuses_with_the_reason(isa_restored):
    before = C.isa()
    with pytest.raises(ValueError, match=r"'sse9'.*no such instruction set"):
        _cpu.set_isa("sse9")
    assert C.isa() == before


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_environment_forces(run_python, isa):
    code = "from fusetune import _native; print(_native.C.isa())"
    assert run_python(code, FUSETUNE_CPU_ISA=isa) == isa


FALL_BACK = """
import torch, fusetune
from fusetune import _native, ops
assert _native.C is None
w = ops.quantize_4bit(torch.randn(64, 64))
y = ops.linear_4bit(torch.randn(2, 64), w)
assert torch.isfinite(y).all()
try:
    with ops.use_backend("cpu"):
        ops.linear_4bit(torch.randn(2, 64), w)
except Exception as error:
    assert _native.reason in str(error), error
else:
    raise AssertionError("the cpu backend was forced and did not complain")
print(_native.reason)
"""


@needs_native
@pytest.mark.parametrize(
    ("isa", "why"),
    [
        ("sse9", "no such instruction set"),
        (
            next(
                (i for i in ("amx", "avx512_bf16", "avx512", "avx2", "neon") if i not in ISAS),
                "neon",
            ),
            "not built for this machine|this CPU does not have it",
        ),
    ],
)
def test_environment_names_what_is_not_available(run_python, isa, why):
    """The package works without the native kernels then, and says why."""
    reason = run_python(FALL_BACK, FUSETUNE_CPU_ISA=isa)
    assert reason.startswith(f"FUSETUNE_CPU_ISA={isa}: ")
    assert any(text in reason for text in why.split("|"))
    assert "available: auto" in reason


def test_works_without_the_native_module(run_python):
    block = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "fusetune._C":
            raise ImportError("no module for this test")
sys.meta_path.insert(0, Missing())
"""
    reason = run_python(block + FALL_BACK)
    assert reason == (
        "the native module fusetune._C could not be imported: no module for this test"
    )


@needs_native
def test_bindings_refuse():
    x = torch.zeros(4, 64)
    w = ops.quantize_4bit(torch.randn(64, 64))
    assert isinstance(w, QuantizedWeight)
    good = (x.data_ptr(), 64, 0)
    with pytest.raises(ValueError, match="dtype code"):
        C.dropout((x.data_ptr(), 64, 3), 4, 64, None, good)
    with pytest.raises(ValueError, match="either a 4-bit or a dense"):
        C.linear(good, 4, 64, 64, None, None, 0, None, good)
    with pytest.raises(ValueError, match="no kernel is called"):
        C.has("linear_5bit")
