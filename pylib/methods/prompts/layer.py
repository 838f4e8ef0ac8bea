"""The one PEFT layer of a model with prompts: it has the encoders, and says whose turn it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fusetune.methods.prompts.config import PromptConfig
from fusetune.nn.adapter_names import BASE, distinct, places

NAME = "prompt_layer"


class PromptLayer(nn.Module, BaseTunerLayer):
    """prompt_encoders: by adapter the Encoder, or a ModuleDict of one for each attention site.

    It is a submodule of the transformers model and computes nothing by itself: hooks on the model
    read it.
    """

    adapter_layer_names = ("prompt_encoders",)

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = (model,)  # in a tuple, so that it is no submodule of its own part
        self.prompt_encoders: Any = nn.ModuleDict()
        self.prompt_configs: dict[str, PromptConfig] = {}
        # The adapter of each row of the batch, while a call is given adapter_names.
        self.rows: tuple[str, ...] | None = None
        self.beams = 1  # a generation may repeat each row so often
        self._kept: dict[tuple[str, str | None], torch.Tensor] | None = None
        self._active_adapter: Any = []

    def update_layer(self, name: str, config: PromptConfig, encoder: nn.Module) -> None:
        """Adds an adapter."""
        self.prompt_encoders[name] = encoder
        self.prompt_configs[name] = config

    def in_turn(self, batch: int) -> tuple[list[str], list[int] | None]:
        """(the adapters of this forward, for each row of the batch which of them it has).

        -1 is a row without; None: all rows have the only adapter. No adapters: nothing to do.
        Raises ValueError where adapter_names does not fit the batch.
        """
        if self._disable_adapters:
            return [], None
        if self.rows is None:
            return [name for name in self.active_adapters if name in self.prompt_encoders], None
        repeats = self.beams if batch == self.beams * len(self.rows) else 1
        if batch != repeats * len(self.rows):
            raise ValueError(
                f"adapter_names must name an adapter for each of {batch} sequences, "
                f"got {len(self.rows)}"
            )
        names = distinct(self.rows, self.prompt_configs)
        if len(names) == 1 and BASE not in self.rows:
            return names, None
        return names, [place for place in places(self.rows, names) for _ in range(repeats)]

    def prompt(self, name: str, site: str | None = None) -> torch.Tensor:
        """The prompt of an adapter [P, W]; within a call without gradients computed once."""
        encoder = self.prompt_encoders[name]
        encoder = encoder if site is None else encoder[site]
        if self._kept is None or torch.is_grad_enabled():
            prompt: torch.Tensor = encoder()
            return prompt
        if (name, site) not in self._kept:
            self._kept[name, site] = encoder()
        return self._kept[name, site]

    @contextmanager
    def call(self, rows: tuple[str, ...] | None, beams: int) -> Iterator[None]:
        """For the length of a forward or a generation rows have these adapters."""
        before = self.rows, self.beams, self._kept
        self.rows, self.beams, self._kept = rows, beams, {}
        try:
            yield
        finally:
            self.rows, self.beams, self._kept = before

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.prompt_configs.pop(adapter_name, None)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Without a base layer there is nothing to follow: prompts are placed when made."""

    def merge(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("a prompt is no weight of the model: it cannot be merged into it")
