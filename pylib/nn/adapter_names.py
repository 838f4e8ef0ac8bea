"""adapter_names: an adapter for each row of a batch, as PEFT has it in forward and generate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

BASE = "__base__"  # a row without adapter


def distinct(adapter_names: Any, known: Iterable[str]) -> list[str]:
    """The adapters among adapter_names, each once, in order.

    Raises ValueError where these are no list of names, or one is of no known adapter.
    """
    if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
        raise ValueError(f"adapter_names must be a list of names, got {adapter_names!r}")
    names = [name for name in dict.fromkeys(adapter_names) if name != BASE]
    known = list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"adapter_names: {name!r} is none of {[*known, BASE]}")
    return names


def places(adapter_names: Sequence[str], names: Sequence[str]) -> list[int]:
    """Which of `names` each row has; -1 for none."""
    return [-1 if name == BASE else names.index(name) for name in adapter_names]
