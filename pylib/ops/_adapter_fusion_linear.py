"""A linear map over blocks of rows, with its parameters' gradients summed over the blocks.

Products with the weight are the native kernel's: torch's, by MKL, repack the weight for every
block, and in 16 bits take ten times as long where the CPU does not multiply them.
"""

from __future__ import annotations

import torch

from fusetune.ops import _cpu
from fusetune.ops._lora_linear_cpu import torch_crawls
from fusetune.ops._weight import as_rows
from fusetune.reference.linear_4bit import accumulate_dtype

Tensor = torch.Tensor


def product_dtype(x: torch.dtype, weight: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    """The wider of both, or that of autocast, which leaves float64 alone."""
    wide = torch.promote_types(x, weight)
    return wide if autocast is None or wide == torch.float64 else autocast


class Linear:
    """x weight^T + bias in `product_dtype`.

    Gradients are summed in fp32 (float64 for float64), block after block. need: those of weight and
    of bias. carrier: "cpu" where native kernels may be used.
    """

    def __init__(
        self,
        x: torch.dtype,
        weight: Tensor,
        bias: Tensor | None,
        need: tuple[bool, bool],
        autocast: torch.dtype | None,
        carrier: str,
    ) -> None:
        self.dtype = product_dtype(x, weight.dtype, autocast)
        self.weight = weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(self.dtype).contiguous()
        self.crawls = torch_crawls(self.dtype)
        self.native = (
            carrier == "cpu"
            and (self.dtype == torch.float32 or self.crawls)
            and self.weight.stride(1) == 1
            and all(map(_cpu.kernels().has, ("linear", "linear_dx")))
        )
        self.dtypes = weight.dtype, None if bias is None else bias.dtype
        # Made at once: what a block needs then lies behind them, at the end of the heap.
        acc = accumulate_dtype(self.dtype)
        n = len(weight)
        self.d_weight = weight.new_zeros(weight.shape, dtype=acc) if need[0] else None
        self.d_bias = weight.new_zeros(n, dtype=acc) if need[1] else None

    def forward(self, x: Tensor, addend: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """addend: in the bias' place. out: in any dtype; without it the result is in self.dtype."""
        x = x.to(self.dtype)
        direct = out if out is None or out.dtype == self.dtype else None
        added = self.bias if addend is None else addend.to(self.dtype)
        if self.native:
            y = self._native(x, False, self.bias if addend is None else None, direct)
            y = y if addend is None else y.add_(addend)
        elif added is None:
            y = torch.mm(x, self.weight.T, out=direct)
        else:
            y = torch.addmm(added, x, self.weight.T, out=direct)
        return y if out is direct or out is None else out.copy_(y)

    def dx(self, dy: Tensor, out: Tensor | None = None) -> Tensor:
        """out: as in forward."""
        dy = dy.to(self.dtype)
        direct = out if out is None or out.dtype == self.dtype else None
        if self.native:
            dx = self._native(dy, True, None, direct)
        else:
            dx = torch.mm(dy, self.weight, out=direct)
        return dx if out is direct or out is None else out.copy_(dx)

    def _native(self, x: Tensor, dx: bool, bias: Tensor | None, out: Tensor | None) -> Tensor:
        """x weight^T + bias; with dx, x weight."""
        n, k = self.weight.shape
        rows = as_rows(x, n if dx else k)
        y = _cpu.empty(len(x), k if dx else n, dtype=self.dtype) if out is None else out
        given = (_cpu.matrix(rows), len(x), n, k, None, _cpu.matrix(self.weight))
        if dx:
            _cpu.kernels().linear_dx(*given, None, None, _cpu.matrix(y))
        else:
            floats = None if bias is None else _cpu.fp32(bias)
            address = 0 if floats is None else floats.data_ptr()
            _cpu.kernels().linear(*given, address, None, _cpu.matrix(y))
        return y

    def add_gradients(self, dy: Tensor, x: Tensor) -> None:
        dy = dy.to(self.dtype)
        if self.d_bias is not None:
            self.d_bias += dy.sum(0, dtype=self.d_bias.dtype)
        if self.d_weight is None:
            return
        x, acc = x.to(self.dtype), self.d_weight.dtype
        if self.dtype == acc or self.crawls:
            self.d_weight.addmm_(dy.T.to(acc), x.to(acc))
        else:
            self.d_weight += dy.T @ x

    def gradients(self) -> tuple[Tensor | None, ...]:
        pairs = zip((self.d_weight, self.d_bias), self.dtypes, strict=True)
        return tuple(None if d is None else d.to(dtype) for d, dtype in pairs)
