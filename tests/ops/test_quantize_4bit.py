"""quantize_4bit and dequantize_4bit against bitsandbytes, bit for bit."""

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusetune import QuantizedWeight, ops
from fusetune.ops._weight import flatten
from fusetune.reference.codebook import (
    BLOCKSIZES,
    NF4,
    QUANT_TYPES,
    codebook,
    dynamic_map,
)

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A whole number of blocks; an odd count; fewer elements than a block; three dimensions; one.
SHAPES = ((128, 64), (129, 65), (3, 7), (3, 5, 130), (4097,))


def assert_equals_bnb(weight, quant_type, blocksize, double_quant):
    packed, state = bnb.quantize_4bit(
        weight,
        blocksize=blocksize,
        quant_type=quant_type,
        compress_statistics=double_quant,
    )
    ours = ops.quantize_4bit(
        weight, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant
    )
    assert torch.equal(ours.packed, packed.flatten())
    assert torch.equal(ours.absmax, state.absmax)
    assert ours.nested == double_quant
    if double_quant:
        assert torch.equal(ours.nested_absmax, state.state2.absmax)
        assert torch.equal(ours.nested_code, state.state2.code)
        assert torch.equal(ours.nested_offset, state.offset)
    return ours, packed, state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_quantised_bits_equal_bitsandbytes(backend, quant_type, blocksize, dtype):
    for i, shape in enumerate(SHAPES):
        assert_equals_bnb(torch.randn(shape).to(dtype), quant_type, blocksize, i % 2 == 0)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_edge_values_equal_bitsandbytes(backend, quant_type):
    """Exact midpoints between codes, zeros of both signs, denormals, one huge value."""
    values = codebook(quant_type, CPU).sort().values
    midpoints = (values[1:] + values[:-1]) / 2
    ties = torch.cat([values, midpoints, midpoints.nextafter(torch.tensor(2.0)), -midpoints])
    weights = [
        torch.cat([ties, torch.ones(1)]),
        torch.cat([torch.zeros(64), -torch.zeros(64)]),
        torch.full((64,), 1e-42),
        torch.cat([torch.randn(100), torch.tensor([3e38])]),
        torch.tensor([-2.0]),
    ]
    for weight in weights:
        for double_quant in (False, True):
            assert_equals_bnb(weight, quant_type, 64, double_quant)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 3000),
    blocksize=st.sampled_from(BLOCKSIZES),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    seed=st.integers(0, 2**31),
)
def test_any_size_equals_bitsandbytes(n, blocksize, scale, seed):
    weight = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * scale
    assert_equals_bnb(weight, "nf4", blocksize, True)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_dequantised_values_equal_bitsandbytes(backend, quant_type, blocksize, out_dtype):
    # Rows of whole blocks, or of no multiple of 16: between them the AVX-512 kernel of
    # bitsandbytes 0.50.2 takes the wrong absmax (see the next test for those shapes).
    for shape, double_quant in (((2, 4096), True), ((130, 82), False)):
        weight = torch.randn(shape)
        w, packed, state = assert_equals_bnb(weight, quant_type, blocksize, double_quant)
        state.dtype = out_dtype
        with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles its fallback
            theirs = bnb.dequantize_4bit(packed, state)
        out = torch.full(shape, torch.nan, dtype=out_dtype)
        assert ops.dequantize_4bit(w, out=out) is out
        assert torch.equal(ops.dequantize_4bit(w, out_dtype), theirs)
        assert torch.equal(out, theirs)


@pytest.mark.parametrize("shape", [(3, 7), (129, 65), (64, 48), (2, 3, 33)])
def test_dequantised_values_where_blocks_cross_rows(backend, shape):
    weight = torch.randn(shape)
    w = ops.quantize_4bit(weight, blocksize=64)
    codes = torch.stack([w.packed >> 4, w.packed & 15], 1).flatten()[: weight.numel()].long()
    block = torch.arange(weight.numel()) // 64
    expected = codebook("nf4", CPU)[codes] * w.absmax[block]
    assert torch.equal(ops.dequantize_4bit(w), expected.view(shape))


def test_dequantise_to_float64_gives_the_fp32_values():
    w = ops.quantize_4bit(torch.randn(5, 64), double_quant=True)
    dense = ops.dequantize_4bit(w, torch.float64)
    assert dense.dtype == torch.float64
    assert torch.equal(dense, ops.dequantize_4bit(w, torch.float32).double())


def test_default_dtype_is_the_weights(backend):
    w = ops.quantize_4bit(torch.randn(4, 64, dtype=torch.bfloat16))
    assert w.dtype == torch.bfloat16
    assert ops.dequantize_4bit(w).dtype == torch.bfloat16


def test_non_contiguous_and_empty_weights(backend):
    weight = torch.randn(70, 130).T
    assert torch.equal(
        ops.quantize_4bit(weight).packed, ops.quantize_4bit(weight.contiguous()).packed
    )
    for double_quant in (False, True):
        w = ops.quantize_4bit(torch.randn(0, 64), double_quant=double_quant)
        assert w.packed.numel() == 0
        assert ops.dequantize_4bit(w).shape == (0, 64)


def test_nf4_is_what_its_definition_gives():
    p = (1 - 1 / 32 + 1 - 1 / 30) / 2
    positive = torch.special.ndtri(torch.linspace(p, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(p, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([positive, torch.zeros(1, dtype=torch.float64), negative]).sort().values
    # The authors rounded p to seven digits, which moves the values by no more than 1e-6.
    assert torch.allclose(torch.tensor(NF4, dtype=torch.float64), values / values.max(), atol=1e-6)


def test_codebooks_equal_bitsandbytes():
    for quant_type in QUANT_TYPES:
        assert torch.equal(codebook(quant_type, CPU), bnb.get_4bit_type(quant_type, CPU))
    assert torch.equal(dynamic_map(CPU), bnb.create_dynamic_map())


@pytest.mark.parametrize(
    ("weight", "options", "error", "names"),
    [
        (torch.zeros(4, dtype=torch.float64), {}, TypeError, "weight must be .*float64"),
        (torch.zeros(4, dtype=torch.int32), {}, TypeError, "weight must be .*int32"),
        ([1.0], {}, TypeError, "weight must be .*list"),
        (torch.zeros(4), {"quant_type": "int4"}, ValueError, "quant_type .* 'int4'"),
        (torch.zeros(4), {"blocksize": 48}, ValueError, "blocksize .* 48"),
        (torch.tensor([1.0, torch.nan]), {}, ValueError, "weight holds NaN"),
        (torch.tensor([1.0, -torch.inf]), {"double_quant": True}, ValueError, "weight holds NaN"),
    ],
)
def test_bad_weights(backend, weight, options, error, names):
    with pytest.raises(error, match=names):
        ops.quantize_4bit(weight, **options)


def test_bad_out():
    w = ops.quantize_4bit(torch.randn(4, 64))
    for out, names in [
        (torch.empty(4, 63), "out must have shape"),
        (torch.empty(64, 4).T, "out must be contiguous"),
        (torch.empty(4, 64, requires_grad=True), "out must not require grad"),
    ]:
        with pytest.raises(ValueError, match=names):
            ops.dequantize_4bit(w, out=out)
    with pytest.raises(ValueError, match=r"out must be torch.float16"):
        ops.dequantize_4bit(w, torch.float16, out=torch.empty(4, 64))
    with pytest.raises(TypeError, match="dtype"):
        ops.dequantize_4bit(w, torch.int32)
    with pytest.raises(TypeError, match="w must be a QuantizedWeight, got Tensor"):
        ops.dequantize_4bit(torch.zeros(3))


def test_opcheck_and_compile(fresh_compiler, backend):
    weight = torch.randn(6, 70)
    w = ops.quantize_4bit(weight, double_quant=True)
    torch.library.opcheck(torch.ops.fusetune.quantize_4bit.default, (weight, "nf4", 64))
    torch.library.opcheck(torch.ops.fusetune.dequantize_4bit.default, (*flatten(w), torch.bfloat16))
    torch.library.opcheck(
        torch.ops.fusetune.dequantize_4bit_out.default, (*flatten(w), torch.empty(6, 70))
    )
    compiled = torch.compile(
        lambda w, out: (ops.dequantize_4bit(w), ops.dequantize_4bit(w, out=out)),
        fullgraph=True,
        backend="aot_eager",
    )
    expected, out = ops.dequantize_4bit(w), torch.empty(6, 70)
    assert all(torch.equal(dense, expected) for dense in (*compiled(w, out), out))
    assert isinstance(w, QuantizedWeight)
