"""QuantizedWeight: what it accepts, bitsandbytes and back, state dicts, copies."""

import copy
import dataclasses
import io

import bitsandbytes as bnb
import pytest
import torch

from fusetune import QuantizedWeight, ops


def make(double_quant=True, shape=(10, 70), **options):
    return ops.quantize_4bit(torch.randn(shape), double_quant=double_quant, **options)


def fields(w):
    return {field.name: getattr(w, field.name) for field in dataclasses.fields(w)}


def assert_equal(one, other):
    for name, value in fields(one).items():
        twin = getattr(other, name)
        same = torch.equal(value, twin) if isinstance(value, torch.Tensor) else value == twin
        assert same, name


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_bitsandbytes_and_back_shares_storage(double_quant, quant_type, storage):
    param = bnb.nn.Params4bit(
        torch.randn(16, 64, dtype=torch.bfloat16),
        quant_type=quant_type,
        compress_statistics=double_quant,
        quant_storage=storage,
    ).to("cpu")
    w = QuantizedWeight.from_bnb(param)
    assert (w.shape, w.dtype, w.quant_type) == ((16, 64), torch.bfloat16, quant_type)
    assert w.packed.data_ptr() == param.data_ptr()
    assert w.absmax.data_ptr() == param.quant_state.absmax.data_ptr()
    back = w.to_bnb(storage)
    assert back.data_ptr() == param.data_ptr()
    assert back.quant_state == param.quant_state
    assert torch.equal(back.data.view(torch.uint8), param.data.view(torch.uint8))
    assert back.dtype == storage
    assert torch.equal(
        bnb.functional.dequantize_4bit(back, back.quant_state), ops.dequantize_4bit(w)
    )


def test_bitsandbytes_parameters_that_cannot_be_read():
    with pytest.raises(ValueError, match="not quantised"):
        QuantizedWeight.from_bnb(bnb.nn.Params4bit(torch.randn(4, 64)))
    repacked = make().to_bnb()
    repacked.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="repacked by bitsandbytes"):
        QuantizedWeight.from_bnb(repacked)
    other = make().to_bnb()
    other.quant_state.code[3] += 0.01
    with pytest.raises(ValueError, match="quant_map differs from the codebook of nf4"):
        QuantizedWeight.from_bnb(other)
    other = make(double_quant=False).to_bnb()
    other.quant_state.absmax = other.quant_state.absmax.bfloat16()
    with pytest.raises(ValueError, match=r"absmax must be torch\.float32"):
        QuantizedWeight.from_bnb(other)


@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_is_the_one_of_bitsandbytes(double_quant):
    layer = bnb.nn.Linear4bit(
        64, 16, bias=False, quant_type="nf4", compress_statistics=double_quant
    ).to("cpu")
    theirs = layer.state_dict()
    w = QuantizedWeight.from_bnb(layer.weight)
    ours = w.state_dict()
    assert ours.keys() == theirs.keys()
    for key in ours:
        if "bitsandbytes__" not in key:  # JSON: the order of its keys may differ
            assert torch.equal(ours[key], theirs[key]), key
    assert_equal(QuantizedWeight.from_state_dict(theirs), w)
    stats = {k.removeprefix("weight."): v for k, v in ours.items() if k != "weight"}
    read = bnb.nn.Params4bit.from_prequantized(ours["weight"], stats, device="cpu")
    assert_equal(QuantizedWeight.from_bnb(read), w)


@pytest.mark.parametrize("double_quant", [False, True])
def test_copies_are_independent(double_quant):
    w = make(double_quant)
    x = torch.randn(3, 70)
    expected = ops.linear_4bit(x, w)  # has cached its addresses by now
    buffer = io.BytesIO()
    torch.save(w, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(w), torch.load(buffer, weights_only=False)):
        assert_equal(twin, w)
        assert twin.packed.data_ptr() != w.packed.data_ptr()
        backup = w.packed.clone()
        w.packed.zero_()
        assert torch.equal(ops.linear_4bit(x, twin), expected)
        w.packed.copy_(backup)
    assert w.to("cpu") is w


def test_sizes():
    w = make(shape=(3, 7))
    assert (w.numel(), w.packed.numel(), w.absmax.numel(), w.nested) == (21, 11, 1, True)
    assert w.nbytes == 11 + 1 + 4 + 256 * 4 + 4
    assert "nf4, shape=(3, 7)" in repr(w)


GOOD = fields(make())


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"packed": GOOD["packed"][:-1]}, r"packed .* must have shape \(350,\), got \(349,\)"),
        ({"packed": GOOD["packed"].view(-1, 1)}, "packed .* must have shape"),
        ({"packed": GOOD["packed"].int()}, r"packed must be torch\.uint8, got torch\.int32"),
        ({"packed": GOOD["packed"].repeat_interleave(2)[::2]}, "packed must be contiguous"),
        ({"absmax": GOOD["absmax"][1:]}, r"absmax .* must have shape \(11,\), got \(10,\)"),
        ({"absmax": GOOD["absmax"].float()}, r"absmax must be torch\.uint8"),
        ({"absmax": GOOD["absmax"].to("meta")}, "absmax is on meta"),
        ({"nested_absmax": None}, "go together"),
        ({"nested_offset": None}, "go together"),
        ({"nested_absmax": torch.ones(2)}, "nested_absmax .* must have shape"),
        ({"nested_absmax": torch.tensor([torch.nan])}, "nested_absmax holds NaN"),
        ({"nested_code": torch.full((256,), torch.inf)}, "nested_code holds NaN or infinity"),
        ({"nested_code": torch.ones(16)}, "nested_code .* must have shape"),
        ({"nested_offset": torch.tensor(torch.nan)}, "nested_offset holds NaN"),
        ({"nested_blocksize": 0}, "nested_blocksize must be positive"),
        ({"quant_type": "int4"}, "quant_type must be one of"),
        ({"blocksize": 63}, "blocksize must be one of"),
        ({"blocksize": 32}, r"absmax .* in blocks of 32 must have shape \(22,\)"),
        ({"shape": torch.Size((11, 70))}, r"packed of a weight of shape \(11, 70\)"),
        ({"dtype": torch.float64}, "dtype must be"),
    ],
)
def test_a_corrupt_weight_says_what_is_wrong(change, names):
    with pytest.raises(ValueError, match=names):
        QuantizedWeight(**(GOOD | change))


def test_nan_in_plain_statistics():
    w = fields(make(double_quant=False))
    with pytest.raises(ValueError, match="absmax holds NaN or infinity"):
        QuantizedWeight(**(w | {"absmax": w["absmax"] * torch.nan}))
    with pytest.raises(TypeError, match="absmax must be a tensor, got NoneType"):
        QuantizedWeight(**(w | {"absmax": None}))


def test_an_incomplete_state_dict_says_what_is_missing():
    state = make().state_dict()
    del state["weight.absmax"]
    with pytest.raises(ValueError, match=r"needs 'weight', 'weight\.absmax'"):
        QuantizedWeight.from_state_dict(state)
    state = make().state_dict()
    state["weight"] = state["weight"][:-3]
    with pytest.raises(ValueError, match=r"packed .* must have shape"):
        QuantizedWeight.from_state_dict(state)
