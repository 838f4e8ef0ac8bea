"""The cache of keys and values among a forward's arguments, by whichever name it has.

transformers 5.24 renamed it: models, hooks and `generate` may have either name at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

NAMES = ("cache", "past_key_values")
_LENGTHS = ("cache_length", "past_key_values_length")  # parameter of modules that count positions


def given(arguments: Mapping[str, Any]) -> Any:
    """The cache, None where there is none."""
    found = (arguments.get(name) for name in NAMES)
    return next((cache for cache in found if cache is not None), None)


def length_name(parameters: Collection[str]) -> str | None:
    """The parameter that tells a module how many tokens are in the cache; None without one."""
    return next((name for name in _LENGTHS if name in parameters), None)
