"""What a model's own parts move through memory where torch computes them, operator by operator.

As transformers' models write them, in 16 bits, forward and backward with frozen weights. As in
ledgers.py an operator reads its operands once and writes its result once; operators on one number
a row are counted too. `least`: what has to move however it is computed.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.ledgers import Operator


class Norm(NamedTuple):
    """An RMS norm of M rows of N."""

    m: int
    n: int

    @property
    def name(self) -> str:
        return f"RMS norm {self.m} × {self.n}"

    def eager(self) -> list[Operator]:
        x, w, row = 2 * self.m * self.n, 2 * self.n, 4 * self.m
        wide = 2 * x
        return [
            Operator("x in fp32", x + wide),
            Operator("x^2", 2 * wide),
            Operator("mean", wide + row),
            *2 * [Operator("+ eps; its root", 2 * row)],
            Operator("x rstd", 2 * wide + row),
            Operator("in 16 bits", wide + x),
            *2 * [Operator("w times it; w dY", 2 * x + w)],
            Operator("in fp32", x + wide),
            Operator("times x", 3 * wide),
            Operator("times rstd", 2 * wide + row),
            Operator("drstd", wide + row),
            *2 * [Operator("of the root", 2 * row)],
            Operator("of the root and the mean", 3 * row),
            Operator("spread over the row", wide + row),
            *2 * [Operator("2 x", 2 * wide)],
            Operator("times the mean's gradient", 3 * wide),
            Operator("sum", 3 * wide),
            Operator("in 16 bits", wide + x),
        ]

    def least(self) -> list[Operator]:
        x = 2 * self.m * self.n
        return [Operator("y", 2 * x), Operator("dX", 3 * x)]


class Rotary(NamedTuple):
    """Queries and keys of B rows of T tokens turned."""

    batch: int
    heads: int
    heads_kv: int
    tokens: int
    dim: int

    @property
    def name(self) -> str:
        heads = f"{self.heads}/{self.heads_kv} × {self.dim}"
        return f"rotary {self.batch} × {self.tokens}, heads {heads}"

    def eager(self) -> list[Operator]:
        table, both = self._sizes()
        return [
            operator
            for x in both
            for _ in ("forward", "backward")
            for operator in (
                Operator("x cos", 2 * x + table),
                Operator("- a half", x),
                Operator("joined", 2 * x),
                Operator("times sin", 2 * x + table),
                Operator("sum", 3 * x),
            )
        ]

    def least(self) -> list[Operator]:
        table, both = self._sizes()
        once = 2 * sum(both) + 2 * table
        return [Operator("turned", once), Operator("turned back", once)]

    def _sizes(self) -> tuple[int, tuple[int, int]]:
        """Bytes of cos, and of queries and keys."""
        table = 2 * self.batch * self.tokens * self.dim
        return table, (table * self.heads, table * self.heads_kv)


class Loss(NamedTuple):
    """Cross-entropy of M rows over a vocabulary of V, its mean."""

    m: int
    v: int

    @property
    def name(self) -> str:
        return f"loss {self.m} × {self.v}"

    def eager(self) -> list[Operator]:
        x, target = 2 * self.m * self.v, 8 * self.m
        wide = 2 * x
        return [
            *2 * [Operator("logits in fp32; their gradient in 16 bits", x + wide)],
            Operator("log-softmax", 2 * wide),
            Operator("loss", wide + target),
            Operator("its gradient", 2 * wide + target),
            Operator("log-softmax's gradient", 3 * wide),
        ]

    def least(self) -> list[Operator]:
        x = 2 * self.m * self.v
        return [Operator("loss", x), Operator("gradient", 2 * x)]


Part = Norm | Rotary | Loss

# Of SmolLM2-135M, and of an 8B LLaMA: 4096 tokens.
PARTS: tuple[Part, ...] = (
    Norm(4096, 576),
    Norm(4096, 4096),
    Rotary(8, 9, 3, 512, 64),
    Rotary(8, 32, 8, 512, 128),
    Loss(4096, 49152),
    Loss(4096, 128256),
)
