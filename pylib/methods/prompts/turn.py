"""The prompts that one forward has."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from fusetune.methods.prompts.template import Template

Tensor = torch.Tensor


class Turn(NamedTuple):
    """The prompts of one forward.

    prompts: [P, H] each; rows: int64 [B], which of them a row has, -1 none, or None: the first.
    lengths: by row how many positions its prompt has, where there are rows; uneven: they differ.
    template: None in front.
    """

    prompts: list[Tensor]
    rows: Tensor | None
    lengths: Tensor | None
    uneven: bool
    template: Template | None
    pseudo_token_id: int

    @property
    def length(self) -> int:
        """P, the longest prompt's."""
        return max(len(prompt) for prompt in self.prompts)

    @property
    def added(self) -> int:
        """How many positions come to a sequence that has no pseudo-tokens in it."""
        if self.template is None:
            return self.length
        return sum(map(len, self.template.around(self.pseudo_token_id)))

    def stacked(self) -> Tensor:
        """[G, P, H], a shorter prompt at the right end."""
        if len(self.prompts) == 1:
            return self.prompts[0][None]
        padded = [
            nn.functional.pad(prompt, (0, 0, self.length - len(prompt), 0))
            for prompt in self.prompts
        ]
        return torch.stack(padded)
