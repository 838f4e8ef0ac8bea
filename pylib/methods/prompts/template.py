"""Templates of P-tuning: where in an input pseudo-tokens and anchors stand."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Slot:
    """Where a piece of the input goes."""

    number: int


# A number of pseudo-tokens, a slot, an anchor's text or its token ids.
Part = int | Slot | str | tuple[int, ...]


@dataclass(frozen=True)
class Template:
    """The parts from left to right."""

    parts: tuple[Part, ...]

    @classmethod
    def parse(cls, template: Sequence[Any]) -> Template:
        """A checked template of what PTuningConfig's argument holds. Raises ValueError."""
        if isinstance(template, str) or not isinstance(template, Sequence):
            raise ValueError(f"template must be a list, got {template!r}")
        parts = [_part(part) for part in template]
        if parts and all(isinstance(part, int) for part in parts):
            # Counts alone: slots are between them; one count is in front of the only slot.
            counts, parts = parts, []
            for number, count in enumerate(counts):
                parts += (
                    [count]
                    if len(counts) > 1 and number == len(counts) - 1
                    else [
                        count,
                        Slot(number),
                    ]
                )
        slots = [part.number for part in parts if isinstance(part, Slot)]
        if sorted(slots) != list(range(len(slots))) or not slots:
            raise ValueError(
                f'template must have each of the slots "{{0}}", "{{1}}", ... once, got {template!r}'
            )
        if not any(isinstance(part, int) and part for part in parts):
            raise ValueError(f"template must have a pseudo-token, got {template!r}")
        return cls(tuple(parts))

    @property
    def count(self) -> int:
        """How many pseudo-tokens there are."""
        return sum(part for part in self.parts if isinstance(part, int))

    @property
    def slots(self) -> int:
        return sum(isinstance(part, Slot) for part in self.parts)

    @property
    def in_front(self) -> bool:
        """Whether this is pseudo-tokens in front of the one slot, and nothing else."""
        return self.slots == 1 and isinstance(self.parts[-1], Slot) and not self.anchored

    @property
    def anchored(self) -> bool:
        return any(isinstance(part, str | tuple) for part in self.parts)

    def with_ids(self, tokenize: Callable[[str], list[int]]) -> Template:
        """With token ids for the texts of anchors."""
        parts = (tuple(tokenize(p)) if isinstance(p, str) else p for p in self.parts)
        return Template(tuple(parts))

    def to_list(self) -> list[Any]:
        """As PTuningConfig's argument."""
        return [
            f"{{{part.number}}}"
            if isinstance(part, Slot)
            else list(part)
            if isinstance(part, tuple)
            else part
            for part in self.parts
        ]

    def fill(self, pieces: Sequence[Sequence[int]], pseudo_token_id: int) -> list[int]:
        """Ids of one input: pieces[i] in slot i, pseudo_token_id where pseudo-tokens are."""
        if len(pieces) != self.slots:
            raise ValueError(f"slots: the template has {self.slots}, got {len(pieces)}")
        ids: list[int] = []
        for part in self.parts:
            ids += (
                [int(i) for i in pieces[part.number]]
                if isinstance(part, Slot)
                else _codes(part, pseudo_token_id)
            )
        return ids

    def around(self, pseudo_token_id: int) -> tuple[list[int], list[int]]:
        """Ids before and behind the only slot."""
        sides: tuple[list[int], list[int]] = ([], [])
        behind = False
        for part in self.parts:
            if isinstance(part, Slot):
                behind = True
            else:
                sides[behind].extend(_codes(part, pseudo_token_id))
        return sides


class Filled(NamedTuple):
    """A batch with a template around its rows.

    source [B, W]: the input's position at each of the result's; -1: the template's.
    ids [B, W]: token ids, pseudo-tokens marked.
    anchor, offset [B, W]: a position id of the result is the input's at `anchor` plus `offset`.
    """

    source: Tensor
    ids: Tensor
    anchor: Tensor
    offset: Tensor

    def take(self, values: Tensor, fill: int) -> Tensor:
        """values [B, T] at the result's positions; `fill` at the template's. [B, W]"""
        taken = values.gather(1, self.source.clamp(min=0))
        return taken.masked_fill(self.source < 0, fill)

    def positions(self, position_ids: Tensor) -> Tensor:
        """Position ids [B or 1, T] continued over the template. [B, W]"""
        given = position_ids.expand(self.source.shape[0], -1)
        return given.gather(1, self.anchor) + self.offset

    def moved(self, places: Tensor) -> Tensor:
        """Where the input's places [B] are in the result; places outside of it stay outside."""
        found = self.source == places[:, None]
        return torch.where(found.any(1), found.long().argmax(1), self.source.shape[1])


def fill_rows(
    input_ids: Tensor, attention_mask: Tensor | None, before: Sequence[int], behind: Sequence[int]
) -> Filled:
    """Puts ids before and behind each row's tokens, inside of its padding.

    input_ids, attention_mask [B, T]: rows padded on either side. Result: W = T + template's.
    """
    batch, length = input_ids.shape
    device = input_ids.device
    first, count = _extent(input_ids, attention_mask)
    inside = torch.arange(length + len(before) + len(behind), device=device) - first
    in_template = torch.stack(
        ((inside >= 0) & (inside < len(before)), _within(inside - len(before) - count, behind))
    )
    # How much of the template is at the left of each position.
    left = inside.clamp(0, len(before)) + (inside - len(before) - count).clamp(0, len(behind))
    taken = (inside + first - left).expand(batch, -1)
    template_ids = torch.tensor([*before, *behind], device=device)
    ids = torch.where(
        in_template.any(0),
        template_ids[left.clamp(max=len(template_ids) - 1)],
        input_ids.gather(1, taken.clamp(0, length - 1)),
    )
    source = taken.masked_fill(in_template.any(0), -1)
    # The template's positions follow those of the token at its left, or lead the first token's.
    last = (first + count - 1).clamp(min=0)
    anchor = torch.where(in_template[0], first, torch.where(in_template[1], last, taken))
    offset = left + in_template[1].long()
    return Filled(source, ids, anchor.clamp(0, length - 1), offset.expand(batch, -1))


def extended(mask: Tensor, added: int) -> Tensor:
    """A mask [B, T] for rows that got `added` places inside of their padding: [B, T + added]."""
    first = (mask != 0).long().argmax(1, keepdim=True)
    count = (mask != 0).sum(1, keepdim=True) + added
    inside = torch.arange(mask.shape[1] + added, device=mask.device) - first
    return ((inside >= 0) & (inside < count)).to(mask.dtype)


def _extent(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where each row's tokens begin and how many there are, padding left out: two of [B, 1]."""
    batch, length = input_ids.shape
    if attention_mask is None:
        zero = torch.zeros(batch, 1, dtype=torch.long, device=input_ids.device)
        return zero, zero + length
    mask = (attention_mask != 0).long()
    count = mask.sum(1, keepdim=True)
    return mask.argmax(1, keepdim=True), count


def _within(index: Tensor, ids: Sequence[int]) -> Tensor:
    return (index >= 0) & (index < len(ids))


def _codes(part: int | str | tuple[int, ...], pseudo_token_id: int) -> list[int]:
    if isinstance(part, int):
        return [pseudo_token_id] * part
    if isinstance(part, str):
        raise ValueError(f"template: the anchor {part!r} has no token ids yet")
    return list(part)


def _part(part: Any) -> Part:
    if isinstance(part, Slot):
        return part
    if isinstance(part, int) and not isinstance(part, bool):
        if part < 0:
            raise ValueError(f"template: a number of pseudo-tokens cannot be {part}")
        return part
    if isinstance(part, str):
        slot = re.fullmatch(r"\{(\d+)\}", part)
        if not slot and not part.strip():
            raise ValueError("template: an anchor cannot be empty")
        return Slot(int(slot[1])) if slot else part
    ids = tuple(part) if isinstance(part, list | tuple) else ()
    if not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
        raise ValueError(f"template: a part must be a number, a text or token ids, got {part!r}")
    return ids
