"""adapter_names, an adapter for each row of a batch, in training too: PEFT's `LoraModel`, swapped.

PEFT hands adapter_names to its layers through hooks that live as long as the model's forward, and
refuses them to a model in training. Its layers differentiate as well as any, so the refusal is
lifted; and the layers that gradient checkpointing computes once more in the backward pass, when
those hooks are gone, are given the names again.

That is transformers' gradient checkpointing. A layer inside another checkpoint, of which the names
are not a part, would be computed once more without them: it raises RuntimeError instead.

PEFT trains the adapters that are active; `model.set_requires_grad(names)` adds the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from fusetune.nn.checkpoint_guard import CheckpointGuard

_CHECKPOINT = "_gradient_checkpointing_func"  # where transformers keeps what it checkpoints with


class FusedLoraModel(LoraModel):
    """`LoraModel` that takes adapter_names in training; its layers have rows of their own."""

    stock_class = LoraModel
    method = None  # its layers have rows

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """As `LoraModel`'s, and in training: adapter_names, an adapter for each row."""
        names = kwargs.get("adapter_names")
        hooked = super()._enable_peft_forward_hooks(*args, **kwargs)
        if names is None:
            with hooked:
                yield
            return
        with ExitStack() as stack:
            stack.callback(_remove_left_hooks, self, _pre_hooks(self))
            if not self.training:
                stack.enter_context(hooked)
                yield
                return
            self.training = False  # of this module alone, while PEFT looks at it
            try:
                stack.enter_context(hooked)
            finally:
                self.training = True
            guard = CheckpointGuard(self)
            stack.enter_context(guard.watching(_layers(self)))
            stack.enter_context(_recomputed_with(self, names, guard))
            yield


def _layers(model: nn.Module) -> list[nn.Module]:
    """Those that PEFT gives adapter_names."""
    kinds = LoraLayer | AuxiliaryTrainingWrapper
    return [module for module in model.modules() if isinstance(module, kinds)]


def _pre_hooks(model: nn.Module) -> set[int]:
    return {key for module in model.modules() for key in module._forward_pre_hooks}


def _remove_left_hooks(model: nn.Module, before: set[int]) -> None:
    """PEFT leaves its hooks behind where the forward raises: later calls would get the names."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if key not in before and "adapter_names" in getattr(hook, "keywords", {}):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


@contextmanager
def _recomputed_with(
    model: nn.Module, names: Sequence[str], guard: CheckpointGuard
) -> Iterator[None]:
    """What transformers checkpoints meanwhile has adapter_names whenever it is computed."""
    replaced = []
    for module in model.modules():
        function = module.__dict__.get(_CHECKPOINT)
        if function is not None and getattr(module, "gradient_checkpointing", False):
            replaced.append((module, function))
            module.__dict__[_CHECKPOINT] = partial(
                _checkpoint, function, partial(_run_with, module, names, guard)
            )
    try:
        yield
    finally:
        for module, function in replaced:
            module.__dict__[_CHECKPOINT] = function


def _checkpoint(
    function: Callable[..., Any],
    run_with: Callable[..., Any],
    run: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    return function(partial(run_with, run), *args, **kwargs)


def _run_with(
    module: nn.Module,
    names: Sequence[str],
    guard: CheckpointGuard,
    run: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """run(...), the layers below `module` under hooks as PEFT's, which may be there as well."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "adapter_names": names}

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in _layers(module)]
    try:
        with guard.names_given():
            return run(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


SWAPS: dict[type[nn.Module], type[nn.Module]] = {LoraModel: FusedLoraModel}
