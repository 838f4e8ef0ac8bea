"""dequantize_4bit on GPUs, simulated or real, bit for bit; the weight with LoRA in it or beside it.

The definition itself is held against bitsandbytes in test_quantize_4bit.py.
"""

import itertools

import pytest
import torch
from backends import GPU, simulated
from lora_cases import quantized

from fusetune import QuantizedWeight, ops
from fusetune.reference import dequantize_4bit as reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Shape, format, block, nested, output. A whole number of blocks and not; less than a word of codes;
# an odd count; blocks across rows; one that spans tiles; one dimension and three.
CASES = (
    ((128, 64), "nf4", 64, True, BF16),
    ((129, 65), "fp4", 64, True, F16),
    ((3, 1), "nf4", 32, False, F32),
    ((130, 300), "nf4", 4096, True, F32),
    ((4097,), "fp4", 128, False, BF16),
    ((3, 5, 130), "nf4", 256, True, F16),
    ((300, 130), "nf4", 32, True, BF16),  # more than 256 blocks: several nested ones
    ((0, 64), "nf4", 64, False, F16),
)


@pytest.mark.parametrize(
    ("backend", "case"), [*itertools.product(GPU, CASES)], indirect=["backend"]
)
def test_values_on_gpus(backend, case):
    shape, quant_type, blocksize, nested, dtype = case
    w = quantized(
        torch.randn(shape), quant_type=quant_type, blocksize=blocksize, double_quant=nested
    )
    got = ops.dequantize_4bit(w, dtype)
    assert got.dtype == dtype
    assert torch.equal(got, reference.dequantize_4bit(w, dtype))
    out = torch.full(shape, torch.nan, dtype=dtype)
    assert ops.dequantize_4bit(w, out=out) is out
    assert torch.equal(out, got)


def test_codes_that_are_not_aligned():
    """A view into a larger buffer, at an odd address: words of four bytes cannot be read there."""
    w = quantized(torch.randn(16, 64))
    buffer = torch.empty(w.packed.numel() + 1, dtype=torch.uint8)
    buffer[1:] = w.packed
    shifted = QuantizedWeight(
        packed=buffer[1:],
        absmax=w.absmax,
        quant_type="nf4",
        blocksize=64,
        shape=w.shape,
        dtype=w.dtype,
    )
    with simulated("triton-sim"):
        assert torch.equal(ops.dequantize_4bit(shifted), reference.dequantize_4bit(w, w.dtype))


@pytest.mark.parametrize("kind", ["dense", "nested"])
@pytest.mark.parametrize(("n", "k", "r"), [(40, 136, 5), (17, 520, 33)])
def test_scaled_b_beside_the_weight(n, k, r, kind):
    """[W | scaling B | zeros], W bit for bit."""
    weight, b = torch.randn(n, k).to(BF16), torch.randn(n, r)
    width = k + r + 3
    out = torch.full((n, width), torch.nan, dtype=BF16)
    with simulated("triton-sim"):
        from fusetune._triton.dequantize_4bit import launch_rows
        from fusetune.ops import _triton

        w = weight if kind == "dense" else quantized(weight, double_quant=True)
        source = w if kind == "dense" else _triton.packed(w)
        launch_rows(source, n, k, lora_B=b, scaling=0.7, out=out)
    dense = weight if kind == "dense" else reference.dequantize_4bit(w, BF16)
    scaled = (b * torch.tensor(0.7)).to(BF16)
    assert torch.equal(out, torch.cat([dense, scaled, torch.zeros(n, 3).to(BF16)], 1))
