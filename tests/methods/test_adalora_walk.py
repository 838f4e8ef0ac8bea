"""The allocator walks over a model once, and again as soon as it would find something else."""

import copy
import pickle

import pytest
import torch
from adalora_models import adalora
from peft import AdaLoraConfig
from torch import nn

from fusetune.methods.adalora import allocator, compact, update_and_allocate
from fusetune.methods.adalora.tuner import WALK
from fusetune.nn.adalora_layers import KEYS, Walk

KEPT = WALK


def step(model, number):
    """One step of training, the same for two models of the same layers."""
    torch.manual_seed(number)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.grad = torch.randn_like(parameter)
            parameter.data -= 0.05 * parameter.grad
    update_and_allocate(model, number)


def state(model):
    """All that the allocator changes."""
    tuner = model.base_model
    kept = tuner.rankallocator
    return {
        "E": {n: p.detach().clone() for n, p in model.named_parameters() if "lora_E" in n},
        "sensitivity": {n: value.clone() for n, value in kept.exp_avg_ipt.items()},
        "uncertainty": {n: value.clone() for n, value in kept.exp_avg_unc.items()},
        "pattern": copy.deepcopy(tuner.peft_config[tuner.trainable_adapter_name].rank_pattern),
    }


def assert_same(got, expected):
    assert got["pattern"] == expected["pattern"]
    for kind in ("E", "sensitivity", "uncertainty"):
        assert got[kind].keys() == expected[kind].keys()
        for name, value in expected[kind].items():
            assert torch.equal(got[kind][name], value), (kind, name)


def attention(model):
    return model.base_model.model.model.layers[0].self_attn


# --- what a new walk would see --------------------------------------------------------------------


def layer_added(model):
    model.base_model.model.extra = copy.deepcopy(attention(model).q_proj)


def layer_added_below_a_leaf(model):
    model.base_model.model.model.norm.extra = copy.deepcopy(attention(model).q_proj)


def layer_added_unnoticed_by_hooks(model):
    attention(model)._modules["extra"] = copy.deepcopy(attention(model).q_proj)


def layer_removed(model):
    attention(model).q_proj = attention(model).q_proj.base_layer


def layer_replaced(model):
    attention(model).q_proj = copy.deepcopy(attention(model).q_proj)


def layer_renamed(model):
    below = attention(model)._modules
    below["renamed"] = below.pop("q_proj")


def layer_is_none_any_more(model):
    below = attention(model).q_proj._modules
    for key in KEYS:
        del below[key]


def adapter_switched(model):
    """PEFT has one trained adapter; the other one's ranks are another model's."""
    other = AdaLoraConfig(**{**model.peft_config["default"].to_dict(), "inference_mode": True})
    model.add_adapter("other", other)
    model.base_model.trainable_adapter_name = "other"


def parameter_replaced(model):
    holder = attention(model).q_proj.lora_E
    holder["default"] = nn.Parameter(2 * holder["default"].detach())


def parameter_replaced_unnoticed_by_hooks(model):
    held = attention(model).q_proj.lora_A._parameters
    held["default"] = nn.Parameter(2 * held["default"].detach())


def parameters_held_by_another_dict(model):
    holder = attention(model).q_proj.lora_B
    holder._parameters = {"default": nn.Parameter(2 * holder["default"].detach())}


def adapter_taken_from_a_layer(model):
    for key in KEYS:
        del attention(model).q_proj._modules[key]["default"]


def ranks_dropped(model):
    with torch.no_grad():
        attention(model).q_proj.lora_E["default"][1] = 0
    compact(model)


SEEN = [
    layer_added,
    layer_added_below_a_leaf,
    layer_added_unnoticed_by_hooks,
    layer_removed,
    layer_replaced,
    layer_renamed,
    layer_is_none_any_more,
    adapter_switched,
    parameter_replaced,
    parameter_replaced_unnoticed_by_hooks,
    parameters_held_by_another_dict,
    adapter_taken_from_a_layer,
    ranks_dropped,
]


@pytest.mark.parametrize("change", SEEN, ids=lambda change: change.__name__)
@pytest.mark.parametrize("last", [4, 10])  # in the middle of the schedule, and when it only masks
def test_a_change_of_the_model_is_a_new_walk(change, last):
    model, _ = adalora()
    for number in range(1, last + 1):
        step(model, number)
    tuner = model.base_model
    walk = tuner.__dict__[WALK]
    assert walk.holds(tuner.model, "default")
    change(model)
    adapter = tuner.trainable_adapter_name
    assert not walk.holds(tuner.model, adapter)
    if last == 10:
        complete_pattern(tuner, adapter)
    fresh = copy.deepcopy(model)
    assert fresh.base_model.__dict__.get(WALK) is None
    for number in range(last + 1, 13):
        step(model, number)
        step(fresh, number)
        assert_same(state(model), state(fresh))


def complete_pattern(tuner, adapter):
    """Entries for layers that came after the ranks were settled."""
    config = tuner.peft_config[adapter]
    config.rank_pattern = config.rank_pattern or {}
    for name, parameter in tuner.model.named_parameters():
        if name.endswith(f"lora_E.{adapter}"):
            config.rank_pattern.setdefault(name, [True] * parameter.shape[0])


def test_a_layer_that_gets_the_adapter_later():
    model, _ = adalora()
    inside = attention(model).q_proj._modules
    taken = {key: inside[key]._parameters.pop("default") for key in KEYS}
    step(model, 1)
    walk = model.base_model.__dict__[WALK]
    for key, parameter in taken.items():
        inside[key]["default"] = parameter
    assert not walk.holds(model.base_model.model, "default")
    step(model, 2)
    assert sum("q_proj" in name for name in state(model)["sensitivity"]) == len(KEYS)


# --- what one walk serves for ---------------------------------------------------------------------


def counted(monkeypatch):
    walks = []
    monkeypatch.setattr(allocator, "Walk", lambda *args: (walks.append(args), Walk(*args))[1])
    return walks


def test_one_walk_for_a_whole_schedule(monkeypatch):
    walks = counted(monkeypatch)
    model, _ = adalora()
    for number in range(1, 13):
        step(model, number)
    assert len(walks) == 1


def memory_swapped(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 3 * parameter.data


def averages_replaced(model):
    kept = model.base_model.rankallocator
    for name, value in kept.exp_avg_ipt.items():
        kept.exp_avg_ipt[name] = 2 * value


def averages_forgotten(model):
    model.base_model.rankallocator.reset_ipt()


def pattern_changed_in_place(model):
    for flags in (model.peft_config["default"].rank_pattern or {}).values():
        flags[0] = not flags[0]


def pattern_of_peft_by_short_names(model):
    config = model.peft_config["default"]
    pattern = config.rank_pattern or {}
    config.rank_pattern = {
        name.removesuffix(".default"): [not flag for flag in flags]
        for name, flags in pattern.items()
    }


@pytest.mark.parametrize(
    "change",
    [
        memory_swapped,
        averages_replaced,
        averages_forgotten,
        pattern_changed_in_place,
        pattern_of_peft_by_short_names,
    ],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("last", [4, 10])
def test_what_may_change_under_one_walk(change, last, monkeypatch):
    """Memory, averages and the pattern are read anew in each step."""
    model, _ = adalora()
    for number in range(1, last + 1):
        step(model, number)
    walks = counted(monkeypatch)
    change(model)
    fresh = copy.deepcopy(model)
    for number in range(last + 1, 13):
        step(model, number)
        step(fresh, number)
        assert_same(state(model), state(fresh))
    assert [args[0] for args in walks] == [fresh.base_model.model]


def test_the_same_memory_in_another_shape():
    """Ranks dropped within a parameter: the walk holds, and what was made of its shape does not."""
    model, _ = adalora()
    for number in range(1, 11):
        step(model, number)
    layer = attention(model).q_proj
    layer.lora_E["default"].data = layer.lora_E["default"].data[:5]
    name = next(n for n in model.peft_config["default"].rank_pattern if "q_proj" in n)
    assert sum(model.peft_config["default"].rank_pattern[name]) != 5
    with pytest.raises(ValueError, match=r"keeps . of 6 triplets of .*q_proj.lora_E, which has 5"):
        update_and_allocate(model, 11)
    model.peft_config["default"].rank_pattern[name] = [False, True, True, True, True]
    layer.lora_E["default"].data += 1
    update_and_allocate(model, 11)
    assert layer.lora_E["default"].eq(0).flatten().tolist() == [True, *[False] * 4]


def test_a_copy_and_a_pickle_walk_for_themselves():
    model, _ = adalora()
    step(model, 1)
    tuner = model.base_model
    walk = tuner.__dict__[KEPT]
    assert copy.deepcopy(walk) is None
    assert pickle.loads(pickle.dumps(walk)) is None
    clone = copy.deepcopy(model)
    before = state(model)
    step(clone, 2)
    assert clone.base_model.__dict__[KEPT] is not walk
    assert clone.base_model.__dict__[KEPT].holds(clone.base_model.model, "default")
    assert not walk.holds(clone.base_model.model, "default")
    assert tuner.__dict__[KEPT] is walk
    assert_same(state(model), before)


def test_compact_lets_go_of_the_old_parameters():
    model, _ = adalora()
    for number in range(1, 10):
        step(model, number)
    compact(model)
    assert KEPT not in model.base_model.__dict__
