"""Logits that are computed where somebody reads them: a tensor without memory.

It has the logits' shape, dtype, device and place in the autograd graph. Any operation on it gets
the logits, computed then; `source_of` gives what they come from, for a loss that does without.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map

from fusetune import ops
from fusetune.ops._registry import OPS


class Source(NamedTuple):
    """logits = x weight^T + bias; `read` is empty until somebody has asked for them."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    read: list[bool]


class LazyLogits(torch.Tensor):
    """[..., V] for x [..., K], in x's dtype or cast to fp32."""

    source: Source
    value: torch.Tensor | None

    @staticmethod
    def of(source: Source, dtype: torch.dtype) -> LazyLogits:
        shape = (*source.x.shape[:-1], source.weight.shape[0])
        lazy: LazyLogits = torch.Tensor._make_wrapper_subclass(
            LazyLogits, shape, dtype=dtype, device=source.x.device
        )
        lazy.source, lazy.value = source, None
        return lazy

    def materialised(self) -> torch.Tensor:
        """The logits themselves, outside of the graph."""
        if self.value is None:
            x, weight, bias, read = self.source
            if not weight.untyped_storage().nbytes():
                raise RuntimeError(
                    "the weight that these logits need was freed after the model's call (FSDP does "
                    "that): fuse without lazy_logits to read them"
                )
            product = ops.linear if x.device.type == "cpu" else nn.functional.linear
            with torch.no_grad():
                self.value = product(x.detach(), weight, bias).to(self.dtype)
            read.append(True)
        return self.value

    def tolist(self) -> Any:
        """As of any tensor, which a subclass does not have."""
        return self.materialised().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As of any tensor: for pickle."""
        return self.materialised().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Models cast their logits to fp32, and accelerate all outputs: read by nobody yet.
        if func is torch.ops.aten._to_copy.default and kwargs == {"dtype": torch.float32}:
            lazy: LazyLogits = args[0]
            if not lazy.source.read:
                return LazyLogits.of(lazy.source, torch.float32)
        args, kwargs = tree_map(
            lambda a: a.materialised() if isinstance(a, LazyLogits) else a, (args, kwargs)
        )
        return func(*args, **kwargs)


def source_of(logits: torch.Tensor) -> Source | None:
    """What logits come from that nobody has read; None for others."""
    if not isinstance(logits, LazyLogits) or logits.source.read:
        return None
    freed = not logits.source.weight.untyped_storage().nbytes()
    return None if freed else logits.source


def lazy_logits(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, read: list[bool]
) -> torch.Tensor:
    """x [..., K] times the transpose of weight [V, K], plus bias [V], both frozen: some day."""
    logits: torch.Tensor = _Defer.apply(x, Source(x, weight, bias, read))
    return logits


class _Defer(torch.autograd.Function):
    """The node of the logits, for those who differentiate through them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, source: Source) -> torch.Tensor:
        ctx.save_for_backward(source.weight)
        return LazyLogits.of(source, x.dtype)

    @staticmethod
    def backward(ctx: Any, dlogits: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        if dlogits.device.type != "cpu" or torch.is_grad_enabled():
            return dlogits @ weight, None
        run = OPS["linear_dx"].run("cpu", dlogits.dtype, weight.dtype)
        rows = dlogits.reshape(-1, weight.shape[0])
        return run(rows, weight).view(*dlogits.shape[:-1], weight.shape[1]), None
