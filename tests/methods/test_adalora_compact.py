"""Dropping pruned triplets: the same outputs, fewer parameters, and a checkpoint PEFT can load."""

import copy
import json

import pytest
import tiny_models
import torch
from adalora_models import adalora, ranknums
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model

import fusetune
from fusetune.methods.adalora import update_and_allocate


def pruned(layers=1, keep=None, **options):
    """(a model with the triplets pruned that `keep` says, by default at random, inputs)"""
    model, inputs = adalora(layers=layers, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for i, each in enumerate(p for n, p in model.named_parameters() if "lora_E" in n):
            left = torch.rand(len(each), generator=generator) < 0.5
            if i == 0:
                left[:] = False  # one layer without any
            each[~left] = 0
    return model, inputs


def logits(model, inputs):
    with torch.no_grad():
        return model(input_ids=inputs["input_ids"]).logits


def left_of(model):
    return sum(int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n)


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_outputs_stay_and_the_zeroes_go(fused, four_bit):
    model, inputs = pruned(four_bit=four_bit)
    if fused:
        fusetune.fuse(model)
    before, wanted = logits(model, inputs), left_of(model)
    scales = {n: p.item() for n, p in ranknums(model).items()}
    ranks = fusetune.compact(model)
    assert sum(ranks.values()) == wanted == left_of(model)
    assert 0 in ranks.values()
    torch.testing.assert_close(logits(model, inputs), before)
    for name, rank in ranks.items():
        layer = model.base_model.model.get_submodule(name)
        n, k = layer.base_layer.out_features, layer.base_layer.in_features
        assert layer.lora_A["default"].shape == (rank, k)
        assert layer.lora_B["default"].shape == (n, rank)
        assert layer.r["default"] == rank
    assert {n: p.item() for n, p in ranknums(model).items()} == scales
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {"lora_A", "lora_B", "lora_E"} == {name.split(".")[-2] for name in trained}
    assert fusetune.compact(model) == ranks  # nothing is left to drop
    model(**inputs).loss.backward()  # training goes on, at these ranks


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_is_loaded_by_stock_peft(tmp_path, fused, dtype):
    model, inputs = pruned(dtype=dtype)
    before = logits(model, inputs)
    if fused:
        fusetune.fuse(model)
    ranks = fusetune.compact(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base, _ = tiny_models.llama(1)
    loaded = PeftModel.from_pretrained(base.to(dtype), tmp_path)
    assert sum(p.shape[0] for n, p in loaded.named_parameters() if "lora_E" in n) == sum(
        ranks.values()
    )
    tolerance = {"rtol": 0.03, "atol": 0.1} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(logits(loaded, inputs), before, **tolerance)
    fusetune.fuse(loaded)
    torch.testing.assert_close(logits(loaded, inputs), before, **tolerance)
    assert fusetune.compact(loaded) == ranks


def test_a_compacted_file_is_the_one_of_a_pruned_model_whose_pattern_is_known(tmp_path):
    """After a schedule PEFT's own file has the same triplets."""
    model, _ = adalora()
    for step in range(1, 13):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.grad = torch.randn_like(parameter)
                parameter.data -= 0.05 * parameter.grad
        update_and_allocate(model, step)
    other = copy.deepcopy(model)
    fusetune.compact(other)
    model.save_pretrained(tmp_path / "stock"), other.save_pretrained(tmp_path / "compact")
    folders = [tmp_path / name for name in ("stock", "compact")]
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
    for config in configs:  # a set: in any order
        config["target_modules"].sort()
    assert configs[0] == configs[1]
    # Masking goes on as before, without effect.
    values = {n: p.clone() for n, p in other.named_parameters()}
    update_and_allocate(other, 13)
    assert all(torch.equal(p, values[n]) for n, p in other.named_parameters())


def test_dropping_twice_composes_the_pattern(tmp_path):
    model, inputs = pruned()
    first = fusetune.compact(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                parameter[:1] = 0
    before = logits(model, inputs)
    second = fusetune.compact(model)
    assert sum(second.values()) < sum(first.values())
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base, _ = tiny_models.llama(1)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path), inputs), before)


def test_merging_what_is_left():
    model, inputs = pruned()
    fusetune.fuse(model)
    before = logits(model, inputs)
    fusetune.compact(model)
    torch.testing.assert_close(logits(model.merge_and_unload(), inputs), before)


def shapes(model):
    return {n: p.shape for n, p in model.named_parameters()}


def refused(model, message, **options):
    before = shapes(model)
    with pytest.raises(ValueError, match=message):
        fusetune.compact(model, **options)
    assert shapes(model) == before


def test_refusals_leave_the_model_alone():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        fusetune.compact(3)
    base, _ = tiny_models.llama(1)
    lora = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    refused(lora, "has no AdaLoRA adapter")
    base, _ = tiny_models.llama(1)
    config = AdaLoraConfig(total_step=9, target_modules=["q_proj"])
    refused(get_peft_model(base, config), "every E of the adapter 'default' is zero: train it")
    model, _ = pruned()
    refused(model, "adapter_name must be one of 'default', got 'other'", adapter_name="other")
    model.merge_adapter()
    refused(model, "has 'default' merged: call unmerge_adapter")
    model.unmerge_adapter()
    model.peft_config["default"].init_r = 9
    refused(model, r"has 6 triplets, which is neither init_r \(9\) nor")
    model.peft_config["default"].init_r = 6
    parameter = next(p for n, p in model.named_parameters() if "lora_B" in n)
    parameter.ds_id = 0
    refused(model, "partitioned by DeepSpeed: it cannot be cut")


def test_only_the_named_adapter():
    model, _ = pruned()
    config = AdaLoraConfig(init_r=4, total_step=9, target_modules=["q_proj"], inference_mode=True)
    model.add_adapter("second", config)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_E.second"
    with torch.no_grad():
        model.get_parameter(name)[1:] = 2.0
    before = shapes(model)
    assert fusetune.compact(model, "second") == {"model.layers.0.self_attn.q_proj": 3}
    changed = {n for n, shape in shapes(model).items() if shape != before[n]}
    assert {n.split(".")[-1] for n in changed} == {"second"}
