"""AdaLoRA's allocation of ranks in transformers' Trainer, which does not call it by itself."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fusetune.methods.adalora.allocator import update_and_allocate
from fusetune.methods.adalora.tuner import trained_adapter, tuner_of


class AdaLoraCallback(TrainerCallback):
    """Allocates ranks after every step of the optimizer: `Trainer(callbacks=[AdaLoraCallback()])`.

    The first step is step 1 of the schedule, so a config whose total_step is the number of the
    training's steps ends on target_r. Warns where training ends before the schedule does. In a
    step that a loss scaler skipped, the gradients, which overflowed, are left out of the
    importances.

    Raises ValueError when training begins, where the model has no trainable AdaLoRA adapter.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        tuner = tuner_of(kwargs["model"])
        config = tuner.peft_config[trained_adapter(tuner)]
        settled = config.total_step - config.tfinal
        if state.max_steps < settled:
            warnings.warn(
                f"AdaLoRA's ranks are settled in step {settled} (total_step - tfinal), but "
                f"training ends after {state.max_steps}: set total_step to {state.max_steps}",
                stacklevel=2,
            )

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Between `optimizer.step()` and `zero_grad()`; global_step is still the last step's."""
        skipped = getattr(kwargs.get("optimizer"), "step_was_skipped", False)
        update_and_allocate(kwargs["model"], state.global_step + 1, gradients=not skipped)
