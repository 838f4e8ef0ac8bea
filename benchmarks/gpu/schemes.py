"""How others compute a LoRA layer on a 4-bit weight, written down in torch: their order of things.

Each takes an input x [M, K] that several projections share (q, k, v; gate, up) and returns their
outputs. The adapters have x's dtype, which is the fastest setting of each. All three dequantise in
three launches: 8-bit statistics to fp32, their offset, then the codes. The last one is our kernel,
so that schemes are compared and not decoders. Descriptions, not code, of the libraries:

- PEFT with bitsandbytes: base layer, copy of its output, x A^T, B^T, times the scaling, plus.
- Unsloth: the vendor's matmul, then the tail added in place (addmm); backward by hand, with dY B
  twice and x A^T once more. With dropout its fast path is off and autograd does the backward.
- Axolotl: the same with dY B once; the dropped-out x is materialised and kept.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from fusetune import QuantizedWeight, ops

Tensor = torch.Tensor
_NESTED = 256


class ThreeLaunches:
    """A double-quantised weight and the buffers to decode it into."""

    def __init__(self, w: QuantizedWeight, dtype: torch.dtype) -> None:
        assert w.nested_code is not None
        assert w.nested_absmax is not None
        blocks = w.absmax.numel()
        padded = functional.pad(w.absmax, (0, -blocks % _NESTED))
        self.codes, self.table = padded.int(), w.nested_code
        self.outer, self.offset = w.nested_absmax[:, None], w.nested_offset
        self.inner = torch.empty(len(padded), device=w.device)
        self.absmax = torch.empty(len(padded), device=w.device)
        fields = {name: getattr(w, name) for name in w.__dataclass_fields__}
        fields |= dict.fromkeys(("nested_absmax", "nested_code", "nested_offset"))
        self.plain = QuantizedWeight.unchecked(**{**fields, "absmax": self.absmax[:blocks]})
        self.out = torch.empty(w.shape, dtype=dtype, device=w.device)

    def dense(self) -> Tensor:
        torch.index_select(self.table, 0, self.codes, out=self.inner)
        shape = self.outer.shape[0], _NESTED
        absmax = self.absmax.view(shape)
        torch.addcmul(self.offset, self.inner.view(shape), self.outer, out=absmax)
        return ops.dequantize_4bit(self.plain, out=self.out)


class Projection(NamedTuple):
    weight: ThreeLaunches
    lora_A: Tensor  # [r, K]
    lora_B: Tensor  # [N, r]
    scaling: float


Scheme = Callable[[Tensor, list[Projection], float], list[Tensor]]


class _Base(torch.autograd.Function):
    """x W^T; the weight is decoded again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: ThreeLaunches) -> Tensor:
        ctx.weight = weight
        return x @ weight.dense().T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.weight.dense(), None


def peft(x: Tensor, projections: list[Projection], p: float) -> list[Tensor]:
    ys = []
    for weight, a, b, scaling in projections:
        y = _Base.apply(x, weight).clone()
        low = functional.dropout(x, p) if p else x
        ys.append(y + functional.linear(functional.linear(low, a), b) * scaling)
    return ys


def _forward(x: Tensor, low: Tensor, projections: list[Projection]) -> tuple[Tensor, ...]:
    ys = []
    for weight, a, b, scaling in projections:
        y = x @ weight.dense().T
        ys.append(y.addmm_(low @ a.T, b.T, alpha=scaling))
    return tuple(ys)


def _scaled(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    out = torch.empty(left.shape[0], right.shape[1], dtype=left.dtype, device=left.device)
    return torch.addmm(out, left, right, beta=0, alpha=scaling, out=out)


class _Unsloth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, projections: list[Projection], *_: Tensor) -> Any:
        ctx.save_for_backward(x)
        ctx.projections = projections
        return _forward(x, x, projections)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        dx, grads = None, []
        for (weight, a, b, scaling), dy in zip(ctx.projections, dys, strict=True):
            grads.append(_scaled((dy @ b).T, x, scaling))
            grads.append(_scaled(dy.T, x @ a.T, scaling))
            dx = dy @ weight.dense() if dx is None else dx.addmm_(dy, weight.dense())
            dx.addmm_(dy @ b, a, alpha=scaling)
        return dx, None, *grads


def unsloth(x: Tensor, projections: list[Projection], p: float) -> list[Tensor]:
    if not p:
        parameters = [t for q in projections for t in (q.lora_A, q.lora_B)]
        return list(_Unsloth.apply(x, projections, *parameters))
    ys = []
    for weight, a, b, scaling in projections:
        low = functional.dropout(x, p) @ a.T
        ys.append(torch.addmm(_Base.apply(x, weight), low, b.T, alpha=scaling))
    return ys


class _Axolotl(torch.autograd.Function):
    """`low` is x, or what dropout leaves of it; then its gradient goes through the dropout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, projections: list[Projection], *_: Tensor) -> Any:
        ctx.save_for_backward(x, low)
        ctx.projections = projections
        return _forward(x, low, projections)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        x, low = ctx.saved_tensors
        apart = low is not x and ctx.needs_input_grad[1]
        dx, dlow, grads = None, None, []
        for (weight, a, b, scaling), dy in zip(ctx.projections, dys, strict=True):
            dyb = dy @ b
            grads.append(_scaled(dyb.T, low, scaling))
            grads.append(_scaled(dy.T, low @ a.T, scaling))
            dx = dy @ weight.dense() if dx is None else dx.addmm_(dy, weight.dense())
            if not apart:
                dx.addmm_(dyb, a, alpha=scaling)
            elif dlow is None:
                dlow = _scaled(dyb, a, scaling)
            else:
                dlow.addmm_(dyb, a, alpha=scaling)
        return dx, dlow, None, *grads


def axolotl(x: Tensor, projections: list[Projection], p: float) -> list[Tensor]:
    low = functional.dropout(x, p) if p else x.detach()
    parameters = [t for q in projections for t in (q.lora_A, q.lora_B)]
    return list(_Axolotl.apply(x, low, projections, *parameters))


SCHEMES: dict[str, Scheme] = {
    "PEFT scheme": peft,
    "Unsloth scheme": unsloth,
    "Axolotl scheme": axolotl,
}


def peft_dora_norm(q: Projection) -> Tensor:
    """PEFT multiplies the adapter with an identity to get B A, and takes the norm of the sum."""
    eye = torch.eye(q.lora_A.shape[1], dtype=q.lora_A.dtype, device=q.lora_A.device)
    delta = functional.linear(functional.linear(eye, q.lora_A), q.lora_B).T
    return (q.weight.dense() + q.scaling * delta).norm(dim=1)
