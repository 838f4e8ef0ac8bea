"""AdaLoRA's allocation of ranks: PEFT's result, step by step, and what PEFT cannot do."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from adalora_models import SCHEDULE, adalora, ranknums
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import fusetune
from fusetune import ops
from fusetune.methods.adalora import update_and_allocate


def e_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_E" in n}


def state_of(model):
    """Copies of both moving averages."""
    allocator = model.base_model.rankallocator
    both = allocator.exp_avg_ipt, allocator.exp_avg_unc
    return tuple({name: value.clone() for name, value in of.items()} for of in both)


def train(model, inputs, allocate, steps, *, lr=0.05, seen=None):
    """Steps of SGD; the gradients depend on nothing that differs between two fair copies."""
    for step in range(1, steps + 1):
        model.zero_grad()
        torch.manual_seed(step)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.grad = torch.randn_like(parameter) * torch.rand(1).item()
                parameter.data -= lr * parameter.grad
        allocate(model, step)
        if seen is not None:
            config = model.peft_config["default"]
            seen.append((e_of(model), copy.deepcopy(config.rank_pattern), state_of(model)))
    return seen


def pefts(model, step):
    model.base_model.update_and_allocate(step)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_schedule_is_pefts(fused, four_bit, dtype, backend):
    """Warm-up, budget steps of which some prune, the settled step, and masking afterwards."""
    options = {"deltaT": 2, "autocast_adapter_dtype": dtype == torch.float32}
    stock, inputs = adalora(four_bit=four_bit, dtype=dtype, **options)
    ours = copy.deepcopy(stock)
    if fused:
        fusetune.fuse(ours)
    expected = train(stock, inputs, pefts, 14, seen=[])
    got = train(ours, inputs, pefts if fused else update_and_allocate, 14, seen=[])
    pruned = 0
    for step, ((e, pattern, state), (their_e, their_pattern, their_state)) in enumerate(
        zip(got, expected, strict=True), 1
    ):
        assert pattern == their_pattern, step
        for name, value in their_e.items():
            assert torch.equal(e[name], value), (step, name)
        for mine, theirs in zip(state, their_state, strict=True):
            assert mine.keys() == theirs.keys()
            for name, value in theirs.items():
                torch.testing.assert_close(
                    mine[name], value, rtol=2e-6 if value.dtype == torch.float32 else 1e-2, atol=0
                )
        pruned += any((value == 0).any() for value in their_e.values())
    assert pruned == 3 + 6  # steps 4, 6 and 8; all from 9, in which the ranks are settled
    kept = sum(sum(flags) for flags in got[-1][1].values())
    assert kept == SCHEDULE["target_r"] * 7


def test_pruned_triplets_can_return():
    model, inputs = adalora(total_step=40, tfinal=2)
    seen = train(model, inputs, update_and_allocate, 30, seen=[])
    patterns = [torch.tensor([f for flags in p.values() for f in flags]) for _, p, _ in seen if p]
    back = [(~before & after).any() for before, after in pairwise(patterns)]
    assert any(back)


def test_state_is_shared_with_peft_in_both_directions():
    """PEFT may take over in the middle of a schedule, and give back."""
    stock, inputs = adalora()
    mixed = copy.deepcopy(stock)

    def alternate(model, step):
        (pefts if step % 2 else update_and_allocate)(model, step)

    expected = train(stock, inputs, pefts, 12, seen=[])
    got = train(mixed, inputs, alternate, 12, seen=[])
    for (e, pattern, _), (their_e, their_pattern, _) in zip(got, expected, strict=True):
        assert pattern == their_pattern
        assert all(torch.equal(e[name], value) for name, value in their_e.items())


def test_d2_equal_ranks_crash_in_stock_peft_and_keep_everything_here():
    stock, inputs = adalora(init_r=3, target_r=3)
    with pytest.raises(RuntimeError, match="kthvalue"):
        train(stock, inputs, pefts, 12)
    model, inputs = adalora(init_r=3, target_r=3)
    train(model, inputs, update_and_allocate, 14)
    pattern = model.peft_config["default"].rank_pattern
    assert all(flags == [True] * 3 for flags in pattern.values())
    assert all((value != 0).all() for value in e_of(model).values())


@pytest.mark.parametrize("fused", [False, True])
def test_one_host_synchronisation_in_a_step_that_prunes_and_none_otherwise(fused, monkeypatch):
    model, inputs = adalora(layers=2, deltaT=3)
    if fused:
        fusetune.fuse(model)
    waits = []
    for name in ("item", "tolist", "__bool__", "__float__", "cpu"):
        stock = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *a, _f=stock, **k: (waits.append(1), _f(self, *a, **k))[1],
        )
    counts = []

    def counting(model, step):
        waits.clear()
        update_and_allocate(model, step)
        counts.append(len(waits))

    train(model, inputs, counting, 12)
    assert counts == [0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0]


def test_importances_survive_steps_whose_gradients_are_of_no_use():
    model, inputs = adalora()
    train(model, inputs, update_and_allocate, 4)
    before = [value.clone() for of in state_of(model) for value in of.values()]
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(torch.inf)
    update_and_allocate(model, 5, gradients=False)
    after = [value for of in state_of(model) for value in of.values()]
    assert all(torch.equal(*each) for each in zip(before, after, strict=True))
    assert model.peft_config["default"].rank_pattern is not None


def test_training_resumed_from_a_checkpoint_reaches_the_target(tmp_path):
    """PEFT drops pruned triplets when it loads; they count as pruned."""
    model, inputs = adalora()
    train(model, inputs, update_and_allocate, 6)
    model.save_pretrained(tmp_path)
    import tiny_models

    base, _ = tiny_models.llama(1)
    resumed = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    ranks = [p.shape[0] for n, p in resumed.named_parameters() if "lora_E" in n]
    assert sum(ranks) < 6 * 7
    for step in range(7, 10):
        for parameter in resumed.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
        update_and_allocate(resumed, step)
    left = sum((value != 0).sum() for value in e_of(resumed).values())
    assert left == 3 * 7


def test_a_layer_whose_triplets_were_loaded_anew_starts_afresh():
    """As when a checkpoint with fewer of them is loaded into a model in training."""
    model, inputs = adalora()
    train(model, inputs, update_and_allocate, 4)
    tuner = model.base_model
    [name, *_] = tuner.peft_config["default"].rank_pattern
    tuner.resize_modules_by_rank_pattern({name: [True] * 5 + [False]}, "default")
    train(model, inputs, update_and_allocate, 5)
    assert tuner.rankallocator.exp_avg_ipt[name].shape == (5, 1)


# --- refusals -------------------------------------------------------------------------------------


def test_models_without_a_trainable_adapter_are_refused(tmp_path):
    import tiny_models

    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        update_and_allocate({}, 1)
    base, _ = tiny_models.llama(1)
    lora = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    for model in (lora, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="has no AdaLoRA adapter: wrap it by"):
            update_and_allocate(model, 1)
    model, _ = adalora()
    model.save_pretrained(tmp_path)
    base, _ = tiny_models.llama(1)
    with pytest.raises(ValueError, match="load it with is_trainable=True"):
        update_and_allocate(PeftModel.from_pretrained(base, tmp_path), 1)


def test_missing_gradients_and_impossible_ranks_are_refused():
    model, inputs = adalora()
    with pytest.raises(
        ValueError, match=r"lora_A.default has no gradient: call .* before zero_grad"
    ):
        update_and_allocate(model, 1)
    assert all((value != 0).all() for value in e_of(model).values())
    model, inputs = adalora(init_r=2, target_r=3)
    with pytest.raises(ValueError, match=r"target_r \(3\) must be at most init_r \(2\)"):
        train(model, inputs, update_and_allocate, 1)


def test_a_schedule_whose_settling_step_was_left_out_is_refused():
    model, inputs = adalora(deltaT=100)
    with pytest.raises(ValueError, match=r"rank_pattern is None after step 9"):
        train(model, inputs, lambda m, s: s == 9 or update_and_allocate(m, s), 12)


def test_a_pattern_of_other_layers_is_refused():
    model, inputs = adalora()
    train(model, inputs, update_and_allocate, 9)
    config = model.peft_config["default"]
    name = next(iter(config.rank_pattern))
    config.rank_pattern[name] = [True] * 4
    with pytest.raises(ValueError, match=r"keeps 4 of 4 triplets of .*lora_E, which has 6"):
        update_and_allocate(model, 10)
    del config.rank_pattern[name]
    with pytest.raises(ValueError, match="has no entry for"):
        update_and_allocate(model, 10)


def test_sharded_parameters_are_left_to_peft(monkeypatch):
    from peft.tuners.adalora import AdaLoraModel

    called = []
    monkeypatch.setattr(AdaLoraModel, "update_and_allocate", lambda self, step: called.append(step))
    model, _ = adalora()
    next(p for n, p in model.named_parameters() if "lora_B" in n).ds_id = 1
    update_and_allocate(model, 3)
    assert called == [3]


def test_a_fused_model_is_copied_and_pickled_with_its_importances():
    model, inputs = adalora()
    fusetune.fuse(model)
    train(model, inputs, update_and_allocate, 4)
    clone = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model.base_model.rankallocator))
    assert pickled.exp_avg_ipt.keys() == model.base_model.rankallocator.exp_avg_ipt.keys()
    for each in (model, clone):
        train(each, inputs, update_and_allocate, 6)
    for name, value in e_of(model).items():
        assert torch.equal(e_of(clone)[name], value)
    assert not ranknums(clone).keys() - ranknums(model).keys()


def test_the_op_is_called_for_all_layers_at_once(monkeypatch):
    sizes = []
    stock = ops.importance
    monkeypatch.setattr(
        ops,
        "importance",
        lambda weights, *rest: (sizes.append(len(weights)), stock(weights, *rest))[1],
    )
    model, inputs = adalora(layers=2)
    train(model, inputs, update_and_allocate, 1)
    assert sizes == [14, 14, 14]
