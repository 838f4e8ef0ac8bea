"""AdaLoRA in transformers' Trainer: the callback sees gradients and reaches the target."""

import warnings

import pytest
import tiny_models
import torch
from adalora_models import adalora
from transformers import Trainer, TrainerCallback, TrainingArguments

import fusetune

STEPS = 8
SCHEDULE = {"init_r": 4, "target_r": 2, "total_step": STEPS, "tinit": 2, "tfinal": 0, "deltaT": 1}


def trainer(model, tmp_path, *callbacks, steps=STEPS, **options):
    data = [{k: v[0] for k, v in tiny_models.token_inputs(1).items()} for _ in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=data, callbacks=list(callbacks))


class Watch(TrainerCallback):
    def __init__(self):
        self.left = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        values = [p for n, p in model.named_parameters() if "lora_E" in n]
        self.left.append(sum(int((value != 0).sum()) for value in values))


@pytest.mark.parametrize("fused", [False, True])
def test_ranks_reach_the_target_with_the_last_step(tmp_path, fused, calls):
    model, _ = adalora(**SCHEDULE)
    if fused:
        fusetune.fuse(model)
    watch = Watch()
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 1.0}
    trainer(model, tmp_path, fusetune.AdaLoraCallback(), watch, **options).train()
    assert calls.count("importance") == 3 * STEPS
    # The cubic schedule from 4 x 7 to 2 x 7, by hand; no step after it has pruned too few.
    budgets = [28] * 2 + [int(14 * (1 - (step - 2) / 6) ** 3 + 14) for step in range(3, 9)]
    assert watch.left == budgets
    assert fusetune.compact(model)
    assert calls.count("orthogonality") == (2 * STEPS if fused else 0)


def test_without_an_adapter_training_does_not_begin(tmp_path):
    model, _ = tiny_models.lora_llama(layers=1)
    with pytest.raises(ValueError, match="has no AdaLoRA adapter"):
        trainer(model, tmp_path, fusetune.AdaLoraCallback()).train()


def test_a_schedule_longer_than_the_training_is_warned_of(tmp_path):
    model, _ = adalora(**{**SCHEDULE, "total_step": 50})
    with pytest.warns(
        UserWarning, match=r"settled in step 50 .* ends after 1: set total_step to 1"
    ):
        trainer(model, tmp_path, fusetune.AdaLoraCallback(), steps=1).train()
    model, _ = adalora(**SCHEDULE)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="AdaLoRA")
        trainer(model, tmp_path, fusetune.AdaLoraCallback()).train()


def test_a_step_that_the_loss_scaler_skipped_leaves_the_importances(calls):
    model, inputs = adalora(**SCHEDULE)
    callback = fusetune.AdaLoraCallback()
    state = type("State", (), {"global_step": 0})()
    model(**inputs).loss.backward()
    for skipped in (False, True):
        optimizer = type("Optimizer", (), {"step_was_skipped": skipped})()
        if skipped:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.nan)
        callback.on_optimizer_step(None, state, None, model=model, optimizer=optimizer)
    averages = model.base_model.rankallocator.exp_avg_ipt.values()
    assert len(averages) == 21
    assert all(value.isfinite().all() for value in averages)
