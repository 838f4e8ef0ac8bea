"""Giving a module another class, with all that is bound to the one it has."""

from __future__ import annotations

import types

from torch import nn

# Methods that may lie in a module's instance -> the one of its class that they then are.
_BOUND = {
    "forward": "forward",
    "_old_forward": "forward",
    "prepare_inputs_for_generation": "prepare_inputs_for_generation",
}


def set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Makes a module one of `kind`; what our classes keep in the instance goes.

    Classes may have `before_unfuse` and `after_fuse`, to be told of it.
    """
    before_unfuse = getattr(type(module), "before_unfuse", None)
    if before_unfuse is not None:
        before_unfuse(module)
    # accelerate keeps the forward it wraps in the instance, bound to the class of that moment, and
    # PEFT's disable_adapter leaves the methods there that it put back.
    for name, method in _BOUND.items():
        function = getattr(module.__dict__.get(name), "__func__", None)
        if function is not None and function is getattr(type(module), method, None):
            module.__dict__[name] = types.MethodType(getattr(kind, method), module)
    for name in [key for key in module.__dict__ if key.startswith("_fusetune")]:
        del module.__dict__[name]
    module.__class__ = kind
    after_fuse = getattr(kind, "after_fuse", None)
    if after_fuse is not None:
        after_fuse(module)
