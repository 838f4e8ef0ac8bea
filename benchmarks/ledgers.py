"""What other ways to compute a QLoRA layer move through memory, operator by operator.

Read from the sources of PEFT 0.21 with bitsandbytes 0.50, and of Unsloth. As everywhere here, an
operator reads its operands once and writes its result once; a matrix product's dense operands stay
in the cache for as long as it needs them.
"""

from __future__ import annotations

from typing import NamedTuple

BLOCK, NESTED = 64, 256  # elements in a block of absmax, blocks in one of the nested absmax


class Operator(NamedTuple):
    name: str
    bytes: int
    flops: int = 0  # on tensor cores


class Layer(NamedTuple):
    """x [M, K], W [N, K] in NF4, adapters of rank r; 2 bytes an element."""

    m: int
    n: int
    k: int
    r: int

    @property
    def x(self) -> int:
        return 2 * self.m * self.k

    @property
    def y(self) -> int:
        return 2 * self.m * self.n

    @property
    def w(self) -> int:
        return 2 * self.n * self.k

    @property
    def s(self) -> int:
        return 2 * self.m * self.r

    @property
    def a(self) -> int:
        return 2 * self.r * self.k

    @property
    def b(self) -> int:
        return 2 * self.n * self.r

    @property
    def packed(self) -> int:
        """W as it is stored: codes, 8-bit absmax, its own absmax."""
        blocks = self.n * self.k // BLOCK
        return self.n * self.k // 2 + blocks + 4 * blocks // NESTED

    @property
    def base(self) -> int:
        """Flops of x W^T, and of dY W."""
        return 2 * self.m * self.n * self.k

    def down(self) -> int:
        return 2 * self.m * self.k * self.r

    def up(self) -> int:
        return 2 * self.m * self.n * self.r


def dequantise(layer: Layer) -> list[Operator]:
    """bitsandbytes: the nested absmax decoded to fp32, its offset added, then W."""
    blocks = layer.n * layer.k // BLOCK
    return [
        Operator("decode absmax", blocks + 4 * blocks // NESTED + 4 * blocks),
        Operator("add its offset", 8 * blocks),
        Operator("decode W", layer.n * layer.k // 2 + 4 * blocks + layer.w),
    ]


def decode_and_multiply(layer: Layer) -> list[Operator]:
    """bitsandbytes' linear_4bit without LoRA, forward and dX, where its own kernel is not used."""
    return [
        *dequantise(layer),
        Operator("y = x W^T", layer.x + layer.w + layer.y, layer.base),
        *dequantise(layer),
        Operator("dX = dY W", layer.y + layer.w + layer.x, layer.base),
    ]


def peft(layer: Layer, dropout: bool) -> list[Operator]:
    """lora.bnb.Linear4bit: every product and every elementwise step is an operator of its own."""
    x, y, w, s, a, b = layer.x, layer.y, layer.w, layer.s, layer.a, layer.b
    mask = x // 2  # a byte an element
    forward = [
        *dequantise(layer),
        Operator("y = x W^T", x + w + y, layer.base),
        Operator("clone y", 2 * y),
        Operator("s = x A^T", x + a + s, layer.down()),
        Operator("s B^T", s + b + y, layer.up()),
        Operator("times scaling", 2 * y),
        Operator("y + that", 3 * y),
    ]
    backward = [
        Operator("dY times scaling", 2 * y),
        Operator("dS = dY B", y + b + s, layer.up()),
        Operator("dB = dY^T s", y + s + b, layer.up()),
        Operator("dX of the adapter", s + a + x, layer.down()),
        Operator("dA = dS^T x", s + x + a, layer.down()),
        *dequantise(layer),
        Operator("dX = dY W", y + w + x, layer.base),
        Operator("dX + that", 3 * x),
    ]
    if dropout:
        forward.append(Operator("dropout of x, with its mask", 2 * x + mask))
        backward.append(Operator("its gradient", 2 * x + mask))
    return forward + backward


def unsloth(layer: Layer, dropout: bool) -> list[Operator]:
    """LoRA_W: products added in place, s not kept. With dropout it leaves the layer to PEFT."""
    if dropout:
        return peft(layer, dropout)
    x, y, w, s, a, b = layer.x, layer.y, layer.w, layer.s, layer.a, layer.b
    forward = [
        *dequantise(layer),
        Operator("y = x W^T", x + w + y, layer.base),
        Operator("s = x A^T", x + a + s, layer.down()),
        Operator("y += s B^T", s + b + 2 * y, layer.up()),
    ]
    backward = [
        Operator("dS = dY B, for dA", y + b + s, layer.up()),
        Operator("dA = dS^T x", s + x + a, layer.down()),
        Operator("s = x A^T, for dB", x + a + s, layer.down()),
        Operator("dB = dY^T s", y + s + b, layer.up()),
        *dequantise(layer),
        Operator("dX = dY W", y + w + x, layer.base),
        Operator("dS = dY B, for dX", y + b + s, layer.up()),
        Operator("dX += dS A", s + a + 2 * x, layer.down()),
    ]
    return forward + backward


def least(layer: Layer, dropout: bool) -> list[Operator]:
    """W never written out, s computed where x is read for y; x and dY once more for dA and dB."""
    x, y, s, a, b = layer.x, layer.y, layer.s, layer.a, layer.b
    tail = layer.down() + layer.up()
    return [
        Operator("y and s", x + layer.packed + a + b + y + s, layer.base + tail),
        Operator("dS and dB", y + s + b + s + b, 2 * layer.up()),
        Operator("dX", y + layer.packed + s + a + x, layer.base + layer.down()),
        Operator("dA", x + s + a, layer.down()),
    ]


SCHEMES = {"PEFT + bitsandbytes": peft, "Unsloth": unsloth, "the least": least}
