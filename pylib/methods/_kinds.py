"""Which class a config is of, where one PEFT type has several kinds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

T = TypeVar("T")


def class_of(kinds: Mapping[str, type[T]], default: str, given: Mapping[str, Any]) -> type[T]:
    """The class of given["kind"]: PEFT builds what it read from a file by the one class that is
    registered for the PEFT type. Raises ValueError for a kind or a field that there is none of."""
    kind = given.get("kind", default)
    if kind not in kinds:
        raise ValueError(f"kind must be one of {sorted(kinds)}, got {kind!r}")
    found: Any = kinds[kind]
    unknown = sorted(set(given) - {f.name for f in fields(found)})
    if unknown:
        raise ValueError(f"adapter_config.json has fields this version does not know: {unknown}")
    return kinds[kind]
