"""What adapters and prefixes move through memory where torch computes them, operator by operator.

Read from the sources of adapters 1.3 (bottleneck, fusion), of PEFT 0.21 and transformers 5.24
(prefixes), all in 16 bits; forward and backward to everything. As in ledgers.py an operator reads
its operands once and writes its result once. `least`: what has to move however it is computed.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.ledgers import Operator


class Bottleneck(NamedTuple):
    """y = r + relu(x W_d^T + b_d) W_u^T + b_u: x, r [M, H], d features."""

    m: int
    h: int
    d: int

    @property
    def name(self) -> str:
        return f"bottleneck {self.m} × {self.h}, d = {self.d}"

    def eager(self) -> list[Operator]:
        x, z, w, product = self._sizes()
        return [
            Operator("z = x W_d^T + b_d", x + w + z + 2 * self.d, product),
            Operator("f(z)", 2 * z),
            Operator("f(z) W_u^T + b_u", z + w + x + 2 * self.h, product),
            Operator("+ r", 3 * x),
            Operator("dW_u = dY^T f(z)", x + z + w, product),
            Operator("db_u", x + 2 * self.h),
            Operator("da = dY W_u", x + w + z, product),
            Operator("dz = da f'(z)", 3 * z),
            Operator("dW_d = dz^T x", z + x + w, product),
            Operator("db_d", z + 2 * self.d),
            Operator("dX = dz W_d", z + w + x, product),
        ]

    def least(self) -> list[Operator]:
        x, z, w, product = self._sizes()
        return [
            Operator("y, and z", 3 * x + z + 2 * w, 2 * product),
            Operator("dX and the parameters' gradients", 3 * x + z + 4 * w, 4 * product),
        ]

    def _sizes(self) -> tuple[int, int, int, int]:
        """Bytes of x, z and a weight; flops of a product."""
        m, h, d = self
        return 2 * m * h, 2 * m * d, 2 * d * h, 2 * m * h * d


class Fusion(NamedTuple):
    """Attention of M tokens to N adapters' outputs [M, H]: query, key and value projected."""

    m: int
    n: int
    h: int

    @property
    def name(self) -> str:
        return f"fusion {self.m} × {self.h}, N = {self.n}"

    def eager(self) -> list[Operator]:
        t, w, p, product = self._sizes()
        n, bias, rows = self.n, 2 * self.h, 2 * self.m * self.n * self.h
        copied = Operator("the stack, rows first", 2 * n * t)
        each = Operator("of N outputs", 2 * n * t + w, n * product)
        dot = t + n * t + p
        return [
            Operator("stack of outputs", 2 * n * t),
            Operator("query", 2 * t + w + bias, product),
            *(copied, each._replace(name="keys")),
            Operator("their bias", 2 * n * t + bias),
            *(copied, each._replace(name="values")),
            Operator("scores", dot, rows),
            Operator("softmax", 2 * p),
            Operator("context", dot, rows),
            Operator("+ residual", 3 * t),
            Operator("dvalues", dot, rows),
            Operator("dp", dot, rows),
            Operator("dscores", 3 * p),
            Operator("dkeys", dot, rows),
            Operator("dquery", dot, rows),
            *(each._replace(name="dW_v"), each._replace(name="doutputs of the values")),
            Operator("dkeys, rows first", 2 * n * t),
            Operator("db_k", n * t + bias),
            *(each._replace(name="dW_k"), each._replace(name="doutputs of the keys")),
            Operator("sum of doutputs", 3 * n * t),
            Operator("dW_q", 2 * t + w, product),
            Operator("db_q", t + bias),
            Operator("dX", 2 * t + w, product),
        ]

    def least(self) -> list[Operator]:
        """W_q^T W_k multiplied first: a product for the query, one for the context."""
        t, w, _, product = self._sizes()
        n, rows, folded = self.n, 2 * self.m * self.n * self.h, 2 * self.h**3
        once = 2 * product + folded
        return [
            Operator("output", 3 * t + n * t + 3 * w, once + 2 * rows),
            Operator("gradients", 3 * t + 2 * n * t + 6 * w, 2 * once + 4 * rows),
        ]

    def _sizes(self) -> tuple[int, int, int, int]:
        """Bytes of [M, H], a weight and the scores; flops of a projection of M rows."""
        m, n, h = self
        return 2 * m * h, 2 * h * h, 2 * m * n, 2 * m * h * h


class Prefix(NamedTuple):
    """Causal attention of T tokens, and to P keys of a prefix: a layer of B rows.

    wide: bytes of an element of the prefix.
    """

    batch: int
    heads: int
    heads_kv: int
    tokens: int
    dim: int
    prefix: int
    wide: int

    @property
    def name(self) -> str:
        kind = {2: "16 bits", 4: "fp32"}[self.wide]
        heads = f"{self.heads}/{self.heads_kv} × {self.dim}"
        return f"prefix {self.batch} × {self.tokens}, heads {heads}, P = {self.prefix} in {kind}"

    def eager(self) -> list[Operator]:
        """Each row's copy of the prefix is looked up, joined with its keys and values, and these
        repeated for the heads of a group; a mask, for the kernels' own is of as many keys."""
        q, kv, lse = self._sizes()
        times, wide = self.heads // self.heads_kv, self.wide
        one = self.prefix * self.heads_kv * self.dim  # elements of the prefix's keys
        rows = self.batch * one
        keys = kv + 2 * rows  # joined
        cells = self.tokens * (self.prefix + self.tokens)  # of the mask
        ids = 8 * self.prefix
        operators = [Operator("look-up", 2 * wide * (one + rows) + ids)]
        laid_out = Operator("of keys and values, laid out", 8 * rows)
        back = [laid_out._replace(name="gradients stacked"), laid_out]
        back.append(operators[0]._replace(name="gradient of the look-up"))
        if wide > 2:
            operators.append(Operator("cast", 2 * (wide + 2) * rows))
            back.insert(2, Operator("gradient of the cast", 2 * (wide + 2) * rows))
        copies = []
        if times > 1:
            copies = 2 * [Operator("repeated for groups", (1 + times) * keys)]
            back = 2 * [copies[0]._replace(name="sum of groups")] + back
        mask = 2 * self.batch * cells
        flops = 4 * self.batch * self.heads * cells * self.dim
        return [
            *operators,
            *2 * [Operator("joined", 2 * keys)],
            *copies,
            Operator("mask, added", mask // 2 + mask),
            Operator("attention", 2 * q + 2 * times * keys + mask + lse, flops),
            Operator("its gradients", 4 * q + 4 * times * keys + mask + lse, 5 * flops // 2),
            *back,
        ]

    def base(self) -> list[Operator]:
        """Causal attention to the tokens alone, by a kernel that leaves out what is masked."""
        q, kv, lse = self._sizes()
        flops = 2 * self.batch * self.heads * self.tokens**2 * self.dim
        return [
            Operator("attention to tokens", 2 * q + 2 * kv + lse, flops),
            Operator("its gradients", 4 * q + 4 * kv + lse, 5 * flops // 2),
        ]

    def least(self) -> list[Operator]:
        forward, backward = self.base()
        pairs = self.batch * self.heads * self.tokens * self.prefix
        more, flops = 2 * self.wide * self.prefix * self.heads_kv * self.dim, 4 * pairs * self.dim
        return [
            Operator("attention", forward.bytes + more, forward.flops + flops),
            Operator("gradients", backward.bytes + 2 * more, backward.flops + 5 * flops // 2),
        ]

    def _sizes(self) -> tuple[int, int, int]:
        """Bytes of the query, of the tokens' keys, and of lse."""
        rows = self.batch * self.tokens
        return (
            2 * rows * self.heads * self.dim,
            2 * rows * self.heads_kv * self.dim,
            4 * rows * self.heads,
        )


Layer = Bottleneck | Fusion | Prefix

# The sizes of a BERT base, of SmolLM2-135M and of a 7B LLaMA.
LAYERS: tuple[Layer, ...] = (
    Bottleneck(4096, 768, 48),
    Bottleneck(2048, 4096, 64),
    *(Fusion(2048, n, 768) for n in (3, 8, 16)),
    *(
        Prefix(8, heads, heads_kv, 512, dim, prefix, wide)
        for heads, heads_kv, dim in ((9, 3, 64), (32, 8, 128))
        for prefix in (32, 128)
        for wide in (2, 4)
    ),
)
