"""Refuses what is checkpointed within a forward by row: it would get wrong gradients, silently.

The names of the rows live as long as the forward. What a torch.utils.checkpoint inside the model
drops is computed again in the backward pass, without them, and so with the active adapter.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch.autograd.function import FunctionCtx

_CHECKPOINT = inspect.unwrap(torch.utils.checkpoint.checkpoint).__code__


class CheckpointGuard:
    """Of one forward by row: its layers look whether a checkpoint began after the names were given.

    In training alone, and where gradients are asked for: elsewhere nothing is computed again.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._depth = 0  # checkpoints that have the names

    @contextlib.contextmanager
    def watching(self, layers: Iterable[nn.Module]) -> Iterator[None]:
        """Names are given, as below; where checkpointed, these layers raise RuntimeError."""
        recomputed = self._model.training and torch.is_grad_enabled()
        watched = layers if recomputed and not torch.compiler.is_compiling() else ()
        handles = [layer.register_forward_pre_hook(self._check) for layer in watched]
        try:
            with self.names_given():
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def names_given(self) -> Iterator[None]:
        """What is computed within the with block has the names, also when it is computed again."""
        if torch.compiler.is_compiling():
            yield
            return
        before, self._depth = self._depth, _checkpoints()
        try:
            yield
        finally:
            self._depth = before

    def _check(self, layer: nn.Module, args: Any) -> None:
        if _checkpoints() <= self._depth:
            return
        names = (name for name, module in self._model.named_modules() if module is layer)
        raise RuntimeError(
            f"adapter_names was given around a checkpoint of {next(names, type(layer).__name__)}: "
            "the backward pass would compute the layer again without the names, with the active "
            "adapter, and so get wrong gradients. Checkpoint the whole call with adapter_names in "
            "it, use gradient_checkpointing_enable() of transformers' models, or do without"
        )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _checkpoints() -> int:
    """How many checkpoints are running a forward here; walking a deep stack takes microseconds.

    Of a compiled layer, those that it was compiled in: a graph cannot look.
    """
    frame: FrameType | None = sys._getframe(1)
    count = 0
    while frame is not None:
        count += frame.f_code is _CHECKPOINT or _in_function(frame)
        frame = frame.f_back
    return count


def _in_function(frame: FrameType) -> bool:
    """Whether a frame is the forward of an autograd.Function: torch's reentrant checkpoint, or that
    of another library. One that calls layers has to compute them again in its backward."""
    code = frame.f_code
    if code.co_name != "forward" or not code.co_argcount or code.co_varnames[0] == "self":
        return False
    return isinstance(frame.f_locals.get(code.co_varnames[0]), FunctionCtx)
