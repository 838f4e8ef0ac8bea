"""What PEFT, transformers and PyTorch can do with a model they can do with a fused one."""

import copy
import gc
import io
import pickle
import weakref

import bitsandbytes as bnb
import pytest
import tiny_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn

import fusetune
from fusetune.integrations.bitsandbytes import Linear4bit
from fusetune.integrations.peft import FusedLinear
from fusetune.integrations.peft_bnb import FusedLinear4bit

LAYER = "base_model.model.model.layers.0.mlp.gate_proj"


def fused_llama(**options):
    model, inputs = tiny_models.lora_llama(layers=1, **options)
    report = fusetune.fuse(model)
    return model, inputs, report


def logits(model, inputs):
    with torch.no_grad():
        return model(input_ids=inputs["input_ids"]).logits


# --- fuse and unfuse ------------------------------------------------------------------------------


@pytest.mark.parametrize("four_bit", [False, True])
def test_fuse_and_unfuse_leave_no_trace(four_bit):
    model, _ = tiny_models.lora_llama(four_bit=four_bit)
    modules = dict(model.named_modules())
    before = {name: (type(m), dict(m.__dict__)) for name, m in modules.items()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fusetune.fuse(model)
    assert list(model.state_dict()) == list(state)
    kinds = {type(m) for m in model.modules()}
    assert (FusedLinear4bit in kinds) == four_bit
    assert (FusedLinear in kinds) != four_bit
    fusetune.unfuse(model)
    assert dict(model.named_modules()) == modules
    for name, module in modules.items():
        assert (type(module), module.__dict__) == before[name]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_fuse_is_idempotent():
    model, _, first = fused_llama(four_bit=True)
    kinds = [type(module) for module in model.modules()]
    assert fusetune.fuse(model).rows == first.rows
    assert [type(module) for module in model.modules()] == kinds


def test_context_manager_restores_the_model():
    model, _ = tiny_models.lora_llama(layers=1)
    layer = model.get_submodule(LAYER)
    with fusetune.fused(model) as report:
        assert type(layer) is FusedLinear
        assert report.fused
    assert type(layer) is lora.Linear
    with pytest.raises(KeyError), fusetune.fused(model):
        raise KeyError
    assert type(layer) is lora.Linear


def test_context_manager_keeps_what_was_fused():
    model, _, _ = fused_llama()
    with fusetune.fused(model):
        pass
    assert type(model.get_submodule(LAYER)) is FusedLinear
    assert model.base_model.model.loss_function.__module__.startswith("fusetune")


def test_a_model_with_nothing_to_fuse():
    report = fusetune.fuse(nn.Sequential(nn.Linear(3, 3)))
    assert report.rows == []
    assert "nothing to fuse" in str(report)


@pytest.mark.parametrize("call", [fusetune.fuse, fusetune.unfuse])
def test_what_is_no_model_is_refused(call):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        call({})


def corrupt_absmax(layer):
    layer.weight.quant_state.absmax[0] = torch.nan


def truncated(layer):
    layer.weight.data = layer.weight.data[:-1]


@pytest.mark.parametrize(
    ("damage", "message"), [(corrupt_absmax, "absmax holds NaN"), (truncated, "packed of a weight")]
)
def test_corrupt_weight_is_refused_and_the_model_unchanged(damage, message):
    torch.manual_seed(0)
    model, _ = tiny_models.llama(1)
    model = tiny_models.with_lora(tiny_models.quantize(model, compress_statistics=False))
    damage(model.get_submodule(LAYER).base_layer)
    kinds = [type(module) for module in model.modules()]
    state = [dict(module.__dict__) for module in model.modules()]
    with pytest.raises(ValueError, match=rf"{LAYER}: {message}"):
        fusetune.fuse(model)
    assert [type(module) for module in model.modules()] == kinds
    assert [module.__dict__ for module in model.modules()] == state


def test_forced_backend_that_cannot_run_is_refused_and_the_model_unchanged():
    model, _ = tiny_models.lora_llama(layers=1)
    kinds = [type(module) for module in model.modules()]
    with fusetune.ops.use_backend("cuda"), pytest.raises(ValueError, match="backend 'cuda'"):
        fusetune.fuse(model)
    assert [type(module) for module in model.modules()] == kinds


def test_unquantised_4bit_layer_has_a_reason():
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
    report = fusetune.fuse(nn.Sequential(layer))
    assert report.rows[0].reason == "the weight is not quantised yet"


def test_a_fused_model_is_never_repacked():
    model, inputs, _ = fused_llama(four_bit=True)
    model.eval()
    logits(model, inputs)
    with model.disable_adapter():
        logits(model, inputs)
    assert fusetune.fuse(model).stock == []


def test_unadapted_4bit_layers_are_fused_too(calls):
    model, inputs = tiny_models.lora_llama(layers=1, four_bit=True, target_modules=["q_proj"])
    report = fusetune.fuse(model)
    assert [row.method for row in report.fused].count("4-bit linear") == 6
    model(**inputs)
    assert calls.count("linear_4bit") == 6
    assert calls.count("lora_linear") == 1


# --- adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("four_bit", [False, True])
def test_state_dict_and_save_load_into_stock(tmp_path, four_bit):
    model, inputs, _ = fused_llama(four_bit=four_bit)
    expected = logits(model.train(), inputs)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base, _ = tiny_models.llama(1)
    stock = PeftModel.from_pretrained(tiny_models.quantize(base) if four_bit else base, tmp_path)
    assert type(stock.get_submodule(LAYER)) in (lora.Linear, lora.Linear4bit)
    torch.testing.assert_close(logits(stock.train(), inputs), expected)
    report = fusetune.fuse(stock)
    assert report.stock == []
    torch.testing.assert_close(logits(stock, inputs), expected)


def test_native_load_adapter(tmp_path, calls):
    model, inputs = tiny_models.lora_llama(layers=1)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    native, _ = tiny_models.llama(1)
    native.load_adapter(str(tmp_path))
    report = fusetune.fuse(native)
    # LoRA; three norms, activation, rotary, attention, lm_head, loss
    assert len(report.fused) == 7 + 8
    torch.testing.assert_close(logits(native, inputs), logits(model, inputs))
    assert calls.count("lora_linear") == 7


@pytest.mark.parametrize("four_bit", [False, True])
def test_disable_and_set_adapter(four_bit):
    model, inputs, _ = fused_llama(four_bit=four_bit)
    stock, _ = tiny_models.lora_llama(layers=1, four_bit=four_bit)
    for each in (model, stock):
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        each.add_adapter("second", config)
        each.train()
    for adapter in ("default", "second", "default"):
        model.set_adapter(adapter), stock.set_adapter(adapter)
        torch.testing.assert_close(logits(model, inputs), logits(stock, inputs))
        with model.disable_adapter(), stock.disable_adapter():
            torch.testing.assert_close(logits(model, inputs), logits(stock, inputs))
    model.delete_adapter("second")
    assert fusetune.fuse(model).stock == []


def test_adapter_on_new_layers_needs_a_second_fuse():
    model, inputs = tiny_models.lora_llama(layers=1, target_modules=["q_proj"])
    report = fusetune.fuse(model)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model.add_adapter("second", config)
    model.set_adapter("second")
    [new] = report.refresh().stock
    assert new.module.endswith("up_proj")
    assert new.reason == "not fused: call fuse()"
    before = logits(model, inputs)
    assert fusetune.fuse(model).stock == []
    torch.testing.assert_close(logits(model, inputs), before)


@pytest.mark.filterwarnings("ignore:.*[mM]erge lora module to 4-bit")
@pytest.mark.parametrize("four_bit", [False, True])
def test_merge(four_bit):
    model, inputs, _ = fused_llama(four_bit=four_bit)
    stock, _ = tiny_models.lora_llama(layers=1, four_bit=four_bit)
    for each in (model, stock):
        each.train()
        each.merge_adapter()
    torch.testing.assert_close(logits(model, inputs), logits(stock, inputs))
    for each in (model, stock):
        each.unmerge_adapter()
    torch.testing.assert_close(logits(model, inputs), logits(stock, inputs))
    model, stock = model.merge_and_unload(), stock.merge_and_unload()
    kind = Linear4bit if four_bit else nn.Linear
    assert type(model.model.layers[0].mlp.gate_proj) is kind
    torch.testing.assert_close(logits(model, inputs), logits(stock, inputs))


@pytest.mark.parametrize("target_rank", [None, 8])
def test_hotswap(tmp_path, target_rank, calls):
    other, inputs = tiny_models.lora_llama(layers=1, lora_alpha=3)
    for name, parameter in other.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1
    other.save_pretrained(tmp_path)
    model, _, _ = fused_llama()
    if target_rank:  # pads the adapters and makes their scalings 0-d tensors
        prepare_model_for_compiled_hotswap(model, target_rank=target_rank)
        assert isinstance(model.get_submodule(LAYER).scaling["default"], torch.Tensor)
    assert not torch.allclose(logits(model, inputs), logits(other, inputs))
    hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
    calls.clear()
    torch.testing.assert_close(logits(model, inputs), logits(other, inputs))
    assert calls.count("lora_linear") == 7


def test_scale_layer():
    model, inputs, _ = fused_llama()
    stock, _ = tiny_models.lora_llama(layers=1)
    for each in (model, stock):
        each.get_submodule(LAYER).scale_layer(0.25)
        each.get_submodule(LAYER).set_scale("default", 3.0)
    torch.testing.assert_close(logits(model, inputs), logits(stock, inputs))


# --- copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("four_bit", [False, True])
def test_deepcopy_is_independent(four_bit, calls):
    model, inputs, _ = fused_llama(four_bit=four_bit)
    expected = logits(model, inputs)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    del model
    gc.collect()
    calls.clear()
    torch.testing.assert_close(logits(clone, inputs), expected)
    assert calls.count("lora_linear") == 7
    if four_bit:
        base = clone.get_submodule(LAYER).base_layer
        assert base.fused_weight().packed.data_ptr() == base.weight.data_ptr()
    fusetune.unfuse(clone)
    assert type(clone.get_submodule(LAYER)) in (lora.Linear, lora.Linear4bit)


def test_pickle_of_a_layer():
    model, _, _ = fused_llama()
    layer = model.get_submodule(LAYER)
    x = torch.randn(2, 64)
    for copied in (pickle.loads(pickle.dumps(layer)), saved_and_loaded(layer)):
        assert type(copied) is FusedLinear
        torch.testing.assert_close(copied(x), layer(x))


def saved_and_loaded(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_replaced_and_converted_weights_are_seen():
    model, inputs, _ = fused_llama(four_bit=True)
    base = model.get_submodule(LAYER).base_layer
    other = bnb.nn.Params4bit(torch.randn(128, 64), quant_type="nf4", requires_grad=False).to("cpu")
    base.weight = other
    assert base.fused_weight().packed.data_ptr() == other.data_ptr()
    moved = other.data.clone()
    base.weight.data = moved
    assert base.fused_weight().packed.data_ptr() == moved.data_ptr()
    dense, _, _ = fused_llama()
    dense.to(torch.bfloat16)
    assert logits(dense, inputs).dtype == torch.bfloat16


def test_unfuse_after_accelerate_wrapped_the_forward():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model, inputs, _ = fused_llama()
    expected = logits(model, inputs)
    add_hook_to_module(model.get_submodule(LAYER), ModelHook())
    fusetune.unfuse(model)
    torch.testing.assert_close(logits(model, inputs), expected)
    remove_hook_from_module(model.get_submodule(LAYER))
    torch.testing.assert_close(logits(model, inputs), expected)


def test_layer_with_its_own_forward_is_left_alone():
    model, _ = tiny_models.lora_llama(layers=1)
    layer = model.get_submodule(LAYER)
    layer.forward = lambda x: x
    [row] = fusetune.fuse(model).stock
    assert row.reason == "it has a forward of its own"
    assert type(layer) is lora.Linear


# --- the report -----------------------------------------------------------------------------------


def test_report_shows_every_layer_once_and_groups_them():
    model, _ = tiny_models.lora_llama(layers=3)
    report = fusetune.fuse(model)
    model.get_submodule(LAYER).base_layer.register_forward_hook(lambda *_: None)
    report.refresh()
    assert len(report.rows) == 3 * (7 + 2 + 3) + 3
    assert [row.module for row in report.stock] == [LAYER]
    text = str(report)
    assert "base_model.model.model.layers.*.self_attn.q_proj" in text
    assert "stock: base_layer has hooks" in text
    assert len(text.splitlines()) == 2 + 1 + 7 + 2 + 3 + 1 + 1 + 1 + 1
    assert len(report.table(full=True).splitlines()) == 2 + 39 + 1
    assert "38 of 39 fused" in text


def test_other_peft_layers_are_listed_with_a_reason():
    model, _ = tiny_models.llama(1)
    options = {"r": 2, "target_modules": ["embed_tokens", "q_proj"]}
    rows = {
        r.module.split(".")[-1]: r
        for r in fusetune.fuse(tiny_models.with_lora(model, **options)).rows
    }
    assert rows["embed_tokens"].fused
    assert rows["q_proj"].fused

    from peft import LoHaConfig

    model, _ = tiny_models.llama(1)
    [row] = fusetune.fuse(get_peft_model(model, LoHaConfig(target_modules=["k_proj"]))).stock
    assert (row.method, row.reason) == ("loha", "loha.Linear has no fused path")


def test_report_does_not_keep_the_model_alive():
    model, _, report = fused_llama()
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    with pytest.raises(ValueError, match="no longer exists"):
        report.refresh()
