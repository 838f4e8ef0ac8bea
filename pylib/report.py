"""What `fuse` did to a model, as a table."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One layer. `reason` is None where it is fused, else why the library's own code runs."""

    module: str
    method: str
    backend: str
    reason: str | None

    @property
    def fused(self) -> bool:
        return self.reason is None


@dataclass
class FuseReport:
    """The layers of a model that `fuse` knows, in their state when the report was made.

    What a layer does may change with the model (an adapter is disabled, merged, a second one is
    activated, a hook is added): `refresh` looks again. `print(report)` shows layers that differ
    only in numbers of their names as one line, `table(full=True)` every layer.
    """

    rows: list[Row]
    _look: Callable[[], list[Row]] = field(repr=False, compare=False)

    def refresh(self) -> FuseReport:
        """Reads the model's present state into this report, and returns it."""
        self.rows = self._look()
        return self

    @property
    def fused(self) -> list[Row]:
        """Rows of the layers that are fused."""
        return [row for row in self.rows if row.fused]

    @property
    def stock(self) -> list[Row]:
        """Rows of the layers that run their library's code, with the reasons."""
        return [row for row in self.rows if not row.fused]

    def table(self, *, full: bool = False) -> str:
        """The report as text: columns module, layers, method, backend, state."""
        lines = _lines(self.rows, full)
        if not lines:
            return "nothing to fuse: the model has no LoRA, adapter or 4-bit layer or known loss"
        head = ("module", "layers", "method", "backend", "state")
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in [head, tuple("-" * width for width in widths), *lines]
        ]
        text.append(f"{len(self.fused)} of {len(self.rows)} fused; no weight is copied")
        return "\n".join(text)

    def __str__(self) -> str:
        return self.table()


def _lines(rows: list[Row], full: bool) -> list[tuple[str, ...]]:
    groups: dict[tuple[str, ...], int] = {}
    for row in rows:
        name = row.module if full else re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.module)
        state = "fused" if row.reason is None else f"stock: {row.reason}"
        key = (name or "(the model)", row.method, row.backend if row.fused else "-", state)
        groups[key] = groups.get(key, 0) + 1
    return [
        (name, str(count), method, backend, state)
        for (name, method, backend, state), count in groups.items()
    ]
