"""Weights that bitsandbytes repacked for its CPU kernel, at an inference before `fuse`."""

import copy

import bitsandbytes as bnb
import pytest
import tiny_models
import torch
from torch import nn

import fusetune
from fusetune import QuantizedWeight

PACK = "_convert_weight_packed_for_cpu"
INVERSE = "_convert_weight_packed_for_cpu_inverse"
LAYER = "base_model.model.model.layers.0.mlp.gate_proj"

pytestmark = pytest.mark.skipif(
    not hasattr(bnb.functional, INVERSE), reason="this bitsandbytes does not undo its packing"
)
needs_kernel = pytest.mark.skipif(
    not bnb.functional.has_avx512bf16(),
    reason="bitsandbytes repacks on CPUs with AVX512-BF16 only",
)


def linear(dtype=torch.bfloat16, shape=(64, 192), **options):
    """A 4-bit layer. 64 x 192: blocks of the packing and of the statistics, several of each."""
    options = {"quant_type": "nf4", "compress_statistics": False, **options}
    layer = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, **options)
    weight = torch.randn(shape, dtype=dtype)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=layer, **options)
    return layer.to("cpu")


def repack(layer):
    """What bitsandbytes does at inference."""
    weight = layer.weight
    weight.data, weight.quant_state = getattr(bnb.functional, PACK)(weight.data, weight.quant_state)
    assert weight.quant_state.packing_format_for_cpu


def raw(weight):
    return weight.data.view(torch.uint8).view(-1)


def repacked_llama(**options):
    torch.manual_seed(0)
    model, inputs = tiny_models.llama(1)
    model = tiny_models.quantize(model.to(torch.bfloat16), **options)
    return tiny_models.with_lora(model).eval(), inputs


def logits(model, inputs):
    with torch.no_grad():
        return model(input_ids=inputs["input_ids"]).logits


def snapshot(module):
    """Everything about the 4-bit weights of a model, for comparison."""
    return [
        (type(m), m.weight, m.weight.data.clone(), m.weight.quant_state, vars(m.weight.quant_state))
        for m in module.modules()
        if isinstance(m, bnb.nn.Linear4bit)
    ]


def assert_unchanged(module, before):
    after = snapshot(module)
    assert len(after) == len(before)
    for (kind, weight, data, state, values), now in zip(before, after, strict=True):
        assert (kind, id(weight), id(state)) == (now[0], id(now[1]), id(now[3]))
        assert torch.equal(data, now[2])
        assert values == now[4]  # the very tensors: those compare by identity first


def frozen(before):
    """The states too may be changed in place."""
    return [(*entry[:4], dict(entry[4])) for entry in before]


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_layout_comes_back(dtype, quant_type, nested, storage):
    options = {"quant_type": quant_type, "compress_statistics": nested}
    layer = linear(dtype, quant_storage=storage, **options)
    original = copy.deepcopy(layer.weight)
    exact = original.quant_state.absmax
    if nested:
        inner = original.quant_state.state2
        exact = bnb.functional.dequantize_blockwise(exact, inner) + original.quant_state.offset
    state = layer.weight.quant_state
    repack(layer)
    assert not torch.equal(raw(layer.weight), raw(original))
    report = fusetune.fuse(nn.Sequential(layer))
    assert report.stock == []
    assert layer.weight.quant_state is state
    assert layer.quant_state is state
    assert layer.weight.dtype == storage
    assert layer.weight.shape == original.shape
    assert torch.equal(raw(layer.weight), raw(original))
    # bitsandbytes' kernel has computed with bfloat16 statistics: for a bfloat16 weight that was not
    # quantised twice they are the original ones.
    assert torch.equal(state.absmax, exact.bfloat16().float())
    assert torch.equal(state.absmax, exact) == (dtype == torch.bfloat16 and not nested)
    assert state.dtype == dtype
    fused = layer.fused_weight()
    assert fused.packed.data_ptr() == layer.weight.data_ptr()
    assert fused.absmax is state.absmax


def test_restored_layer_dequantises_to_what_the_kernel_multiplied_by():
    """The whole way once more in numbers, with the packed layout read independently."""
    layer = linear(torch.float32)
    repack(layer)
    state = layer.weight.quant_state
    nibbles = torch.stack([layer.weight.data & 15, layer.weight.data >> 4]).view(2, 2, 96, 32)
    # Byte j of column pair p of 32 rows: low nibbles rows 0-15, high nibbles rows 16-31.
    codes = nibbles.permute(1, 0, 3, 2).reshape(2, 2, 16, 2, 96).permute(0, 1, 2, 4, 3)
    values = state.code[codes.reshape(64, 192).long()]
    expected = values * state.absmax.float().T.repeat_interleave(state.blocksize, 1)
    fusetune.fuse(nn.Sequential(layer))
    assert torch.equal(fusetune.ops.dequantize_4bit(layer.fused_weight()), expected)


@needs_kernel
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_goes_on_as_if_there_had_been_no_evaluation(mode, calls):
    model, inputs = repacked_llama(compress_statistics=False)
    never = copy.deepcopy(model)
    with mode():
        model(**inputs)
    assert model.get_submodule(LAYER).base_layer.weight.quant_state.packing_format_for_cpu
    results = []
    for each in (model, never):
        assert fusetune.fuse(each.train()).stock == []
        calls.clear()
        results.append(tiny_models.loss_and_grads(each, inputs))
        assert calls.count("lora_linear") == 7
    (loss, out, grads), (expected_loss, expected_out, expected_grads) = results
    assert torch.equal(loss, expected_loss)
    assert torch.equal(out, expected_out)
    assert grads.keys() == expected_grads.keys()
    assert grads
    for name, value in grads.items():
        assert torch.equal(value, expected_grads[name]), name


@needs_kernel
def test_fuse_inside_inference_mode_leaves_weights_that_can_be_trained_over():
    model, inputs = repacked_llama()
    with torch.inference_mode():
        model(**inputs)
        assert fusetune.fuse(model).stock == []
    model.train()
    loss, _, grads = tiny_models.loss_and_grads(model, inputs)
    assert torch.isfinite(loss)
    assert len(grads) == 14


@needs_kernel
@pytest.mark.parametrize("nested", [False, True])
def test_unfuse_leaves_what_bitsandbytes_repacks_to_the_same(nested):
    model, inputs = repacked_llama(compress_statistics=nested)
    expected = logits(model, inputs)
    with fusetune.fused(model) as report:
        assert report.stock == []
        # Weights rounded alike, activations not: bitsandbytes' kernel takes bfloat16 ones.
        torch.testing.assert_close(logits(model, inputs), expected, atol=0.05, rtol=0.05)
    assert torch.equal(logits(model, inputs), expected)
    fusetune.fuse(model)
    fusetune.unfuse(model)
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("nested", [False, True])
def test_state_dict_of_a_restored_layer_loads(nested):
    layer = linear(compress_statistics=nested)
    repack(layer)
    fusetune.fuse(nn.Sequential(layer))
    state = layer.state_dict()
    loaded = QuantizedWeight.from_state_dict(state)
    assert torch.equal(
        fusetune.ops.dequantize_4bit(loaded), fusetune.ops.dequantize_4bit(layer.fused_weight())
    )


def test_layers_that_share_a_weight():
    first, second = linear(), linear()
    second.weight, second.quant_state = first.weight, first.weight.quant_state
    repack(first)
    assert fusetune.fuse(nn.Sequential(first, second)).stock == []
    assert second.quant_state is first.weight.quant_state
    x = torch.randn(3, 192)
    assert torch.equal(first(x), second(x))


@needs_kernel
def test_a_fused_layer_that_was_repacked_is_restored_by_the_next_fuse():
    model = nn.Sequential(linear()).eval()
    report = fusetune.fuse(model)
    expected = fusetune.ops.dequantize_4bit(model[0].fused_weight())
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    model(torch.randn(2, 192, dtype=torch.bfloat16))  # a hook on all modules: the stock forward
    handle.remove()
    [row] = report.refresh().stock
    assert row.reason == "bitsandbytes repacked the weight at inference: call fuse() again"
    assert fusetune.fuse(model).stock == []
    assert torch.equal(fusetune.ops.dequantize_4bit(model[0].fused_weight()), expected)


def wrong_codes(packed, state):
    data, state = INVERSE_OF_TODAY(packed, state)
    data[0] ^= 1
    return data, state


def raises(packed, state):
    state.shape = None
    raise AssertionError("N must be divisible by block_n")


def other_shape(packed, state):
    data, state = INVERSE_OF_TODAY(packed, state)
    return data[:-1], state


INVERSE_OF_TODAY = getattr(bnb.functional, INVERSE, None)


@pytest.mark.parametrize(
    ("inverse", "why"),
    [
        (None, "this version has no inverse"),
        (wrong_codes, "its inverse is not exact"),
        (raises, r"its inverse failed (N must be divisible by block_n)"),
        (other_shape, "its inverse failed"),
    ],
)
def test_without_an_exact_inverse_nothing_changes(monkeypatch, inverse, why):
    if inverse is None:
        monkeypatch.delattr(bnb.functional, INVERSE)
    else:
        monkeypatch.setattr(bnb.functional, INVERSE, inverse)
    model = nn.Sequential(linear(), linear(compress_statistics=True))
    repack(model[0])
    before = frozen(snapshot(model))
    rows = fusetune.fuse(model).rows
    assert why in rows[0].reason
    assert rows[0].reason.endswith("fuse before the first evaluation, or load the model again")
    assert rows[1].fused
    fusetune.unfuse(model)
    assert_unchanged(model, before)
    monkeypatch.undo()
    assert fusetune.fuse(model).stock == []


def test_statistics_in_another_layout_are_refused():
    model = nn.Sequential(linear())
    repack(model[0])
    state = model[0].weight.quant_state
    state.absmax = state.absmax.T.contiguous()
    before = frozen(snapshot(model))
    [row] = fusetune.fuse(model).stock
    assert "its inverse is not exact" in row.reason
    fusetune.unfuse(model)
    assert_unchanged(model, before)


def test_weights_are_as_they_were_if_another_layer_is_corrupt():
    model = nn.Sequential(linear(), linear(compress_statistics=True), linear(torch.float32))
    repack(model[0])
    repack(model[1])
    repack(model[2])
    model[2].weight.quant_state.absmax[0, 0] = torch.nan
    before = frozen(snapshot(model))
    with pytest.raises(ValueError, match="2: absmax holds NaN"):
        fusetune.fuse(model)
    assert_unchanged(model, before)


def test_packing_that_bitsandbytes_gave_up_halfway():
    """Rows that are no whole blocks: the statistics are plain numbers by then, in plain order."""
    layer = linear(shape=(64, 96), compress_statistics=True)
    expected = fusetune.ops.dequantize_4bit(QuantizedWeight.from_bnb(layer.weight))
    with pytest.raises(RuntimeError):
        repack(layer)
    assert fusetune.fuse(nn.Sequential(layer)).stock == []
    assert torch.equal(fusetune.ops.dequantize_4bit(layer.fused_weight()), expected)
