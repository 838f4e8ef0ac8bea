"""Input embeddings with prompts in them: by hooks on the transformers model.

`generate` calls the transformers model itself, not PEFT's: what has to happen at each forward is
done here. The prompt goes in where there is no cache yet; with a cache, the mask and the positions
count what is in it.
"""

from __future__ import annotations

from typing import Any

import torch

from fusetune.methods.prompts import arguments
from fusetune.methods.prompts.arguments import Arguments
from fusetune.methods.prompts.layer import PromptLayer
from fusetune.methods.prompts.shallow_config import PTuningConfig
from fusetune.methods.prompts.template import Template
from fusetune.methods.prompts.turn import Turn
from fusetune.nn import cache_argument

Tensor = torch.Tensor


class EmbeddingHooks:
    """The hooks of one model. `remove` takes them away."""

    def __init__(self, model: Any, layer: PromptLayer) -> None:
        self.layer = layer
        hooked = [(model, self._before_model)]
        if model.config.is_encoder_decoder:
            # `generate` calls the encoder by itself.
            encoder, decoder = model.get_encoder(), model.get_decoder()
            hooked = [(encoder, self._before_model), (decoder, self._before_decoder)]
        self._handles = [
            module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooked
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before_model(self, module: Any, args: Any, kwargs: Arguments) -> Any:
        """Of the model, or of the encoder of an encoder-decoder model."""
        if not self._concerned():
            return None
        values = arguments.named(module, args, kwargs)
        given = values.get("input_ids")
        given = values.get("inputs_embeds") if given is None else given
        turn = None if given is None else self._turn(given.shape[0], given.device)
        if given is None or turn is None:
            return None
        arguments.check(values)
        cache = cache_argument.given(values)
        if cache is not None and cache.get_seq_length() > 0:
            arguments.continue_after_cache(values, turn, given.shape[1])
        elif values.get("inputs_embeds") is not None:
            arguments.put_before_embeddings(module, values, turn)
        elif turn.template is None:
            arguments.put_in_front(module, values, turn)
        else:
            arguments.put_at_places(module, values, turn)
        if _classifies_by_last(module):
            arguments.align_right(values)
        return (), values

    def _before_decoder(self, module: Any, args: Any, kwargs: Arguments) -> Any:
        """Its mask of the encoder's output is that of the encoder's input: without the prompt."""
        if not self._concerned():
            return None
        values = arguments.named(module, args, kwargs)
        states = values.get("encoder_hidden_states")
        turn = None if states is None else self._turn(states.shape[0], states.device)
        if states is None or turn is None:
            return None
        mask = values.get("encoder_attention_mask")
        values["encoder_attention_mask"] = arguments.mask_of_encoded(mask, states, turn)
        return (), values

    def _concerned(self) -> bool:
        """Whether a prompt of this kind has its turn, whatever the batch."""
        layer = self.layer
        names = layer.active_adapters if layer.rows is None else layer.rows
        configs = (layer.prompt_configs.get(name) for name in names)
        return not layer.disable_adapters and any(c is not None and not c.deep for c in configs)

    def _turn(self, batch: int, device: torch.device) -> Turn | None:
        names, rows = self.layer.in_turn(batch)
        configs: list[Any] = [self.layer.prompt_configs[name] for name in names]
        if any(config.deep for config in configs):
            raise ValueError(f"adapter_names: {names} mixes prefixes and prompts in one batch")
        templates = [_template(config) for config in configs]
        if rows is not None and any(template is not None for template in templates):
            raise ValueError(
                f"adapter_names: of {names}, one has a template; in a batch of several adapters "
                "each must have its prompt in front"
            )
        prompts = [self.layer.prompt(name) for name in names]
        if rows is None:
            mark = getattr(configs[0], "pseudo_token_id", None)
            return Turn(prompts, None, None, False, templates[0], -1 if mark is None else mark)
        lengths = [len(prompts[row]) if row >= 0 else 0 for row in rows]
        which, used = (torch.tensor(numbers, device=device) for numbers in (rows, lengths))
        return Turn(prompts, which, used, len(set(lengths)) > 1, None, -1)


def _template(config: Any) -> Template | None:
    """None: the prompt is in front."""
    if not isinstance(config, PTuningConfig) or config.parsed.in_front:
        return None
    return config.parsed


def _classifies_by_last(module: Any) -> bool:
    name = type(module).__name__
    return name.endswith("ForSequenceClassification") and hasattr(module, "score")
