"""`fuse`, `unfuse` and `fused`: the fused forwards, in place and reversible.

A layer is fused by swapping its class for a subclass that overrides `forward` only. The object, its
parameters and every reference to it stay, so optimisers, state dicts and PEFT notice nothing.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fusetune.integrations._classes import set_class
from fusetune.report import FuseReport, Row

# Integrations that swap classes, and the libraries they need. A library that was never imported has
# no model here, and importing these takes seconds.
_LAYERS = {
    "linear": (),
    "peft": ("peft",),
    "bitsandbytes": ("bitsandbytes",),
    "peft_bnb": ("peft", "bitsandbytes"),
    "peft_conv": ("peft",),
    "peft_embedding": ("peft",),
    "peft_experts": ("peft", "transformers"),
    "peft_ia3": ("peft",),
    "peft_ia3_bnb": ("peft", "bitsandbytes"),
    "peft_lora_model": ("peft",),
    "peft_prompts": ("peft",),
    "peft_adalora": ("peft",),
    "peft_adalora_bnb": ("peft", "bitsandbytes"),
    "transformers_dropout": ("transformers",),
    "transformers_mlp": ("transformers",),
    "transformers_norm": ("transformers",),
    "transformers_rotary": ("transformers",),
}
# Integrations that give a function to modules, whose classes stay: install, installed, restore.
_FUNCTIONS = ("transformers", "transformers_attention", "transformers_lazy_logits")


def fuse(
    model: nn.Module, *, loss: bool = True, dropout: bool = True, lazy_logits: bool = False
) -> FuseReport:
    """Fuses what can be fused of a model, in place, and reports on every layer concerned.

    Covers PEFT's LoRA, AdaLoRA and IA3 on dense and on bitsandbytes' 4-bit linear layers, LoRA on
    token embeddings, convolutions and transformers' experts, PEFT's prefix tuning, 4-bit layers
    without an adapter, transformers' RMS norms, its rotary embedding of positions, the activation
    of its gated MLPs and, with `loss`, its language-model losses; on CPUs its sdpa attention and
    the linear layers that are frozen and fp32. With `dropout`, on CPUs, also the dropout that
    transformers' own modules have: its rates stay, and torch.manual_seed fixes its masks, but they
    are not those that torch draws.
    With `lazy_logits`, a language model with a frozen last layer computes its loss in training by
    blocks of rows, and `outputs.logits` only where somebody reads them: less memory, and nothing is
    computed for labels of -100. (Once read, they are computed at once until `fuse` is called again.
    Not under torch.compile.)
    Call it once the adapters are in place; another call covers what was added since and changes
    nothing else.

    A 4-bit weight that bitsandbytes has repacked for its CPU kernel gets its plain layout back.
    What a layer cannot do exactly runs its library's own code, and the report says why. Raises
    TypeError where `model` is no module, and ValueError where a 4-bit weight is corrupt, a forced
    backend (FUSETUNE_BACKEND) cannot run, or `lazy_logits` comes without `loss`; the model is then
    as it was.
    """
    if lazy_logits and not loss:
        raise ValueError("lazy_logits needs loss=True: the stock loss reads the logits")
    with _undone_on_error(model) as undo:
        importlib.import_module("fusetune.integrations.linear").discover(model)
        if "transformers" in sys.modules:
            parts = ("mlp", "norm", "rotary", *(["dropout"] if dropout else []))
            for part in parts:
                importlib.import_module(f"fusetune.integrations.transformers_{part}").discover(
                    model
                )
        swaps = _swaps()
        if not dropout:
            swaps.pop(nn.Dropout, None)
        restorable = {kind for kind in swaps.values() if hasattr(kind, "restore_layout")}
        installs = _installs(loss, dropout, lazy_logits)
        for module in model.modules():
            target = _target(module, swaps)
            if target is not None and not _has_own_forward(module):
                set_class(module, target)
            elif hasattr(type(module), "after_fuse"):  # fused before: what was changed since
                refreshed: Any = module
                refreshed.after_fuse()
            if type(module) in restorable:
                restored: Any = module
                undo += restored.restore_layout()
            for install in installs:
                install(module)
        if "peft" in sys.modules:
            importlib.import_module("fusetune.integrations._groups").link(model)
        return FuseReport(_rows(model), _looker(model))


def unfuse(model: nn.Module) -> None:
    """Undoes `fuse`: every layer and loss is its library's again. Raises TypeError."""
    _check(model)
    fused_classes, functions = set(_swaps().values()), _functions()
    for module in model.modules():
        kind: Any = type(module)
        if kind in fused_classes:
            set_class(module, kind.stock_class)
        for part in functions:
            part.restore(module)


@contextmanager
def fused(
    model: nn.Module, *, loss: bool = True, dropout: bool = True, lazy_logits: bool = False
) -> Iterator[FuseReport]:
    """`fuse` for the length of a with block; what was fused before stays fused after it."""
    restore = _snapshot(model)
    try:
        yield fuse(model, loss=loss, dropout=dropout, lazy_logits=lazy_logits)
    finally:
        restore()


@contextmanager
def _undone_on_error(model: nn.Module) -> Iterator[list[Callable[[], None]]]:
    """Gives a list for what else has to be undone; the last first."""
    undo = [_snapshot(model)]
    try:
        yield undo
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _snapshot(model: nn.Module) -> Callable[[], None]:
    """A function that gives every module of the model the class and functions it has now."""
    _check(model)
    classes = [(module, type(module)) for module in model.modules()]
    functions = [
        (part, {id(module) for module, _ in classes if part.installed(module)})
        for part in _functions()
    ]

    def restore() -> None:
        for module, kind in classes:
            if type(module) is not kind:
                set_class(module, kind)
            for part, having in functions:
                if id(module) not in having:
                    part.restore(module)

    return restore


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _target(module: nn.Module, swaps: dict[type[nn.Module], type[Any]]) -> type[Any] | None:
    """The fused class of a stock module; None for a module of another kind."""
    kind = swaps.get(type(module))
    accepts = getattr(kind, "accepts", None)
    return None if accepts is not None and not accepts(module) else kind


def _has_own_forward(module: nn.Module) -> bool:
    own = module.__dict__.get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def _swaps() -> dict[type[nn.Module], type[Any]]:
    """Stock class -> fused class, of the libraries in use."""
    swaps: dict[type[nn.Module], type[Any]] = {}
    for name, libraries in _LAYERS.items():
        if all(library in sys.modules for library in libraries):
            swaps.update(importlib.import_module(f"fusetune.integrations.{name}").SWAPS)
    return swaps


def _functions() -> list[types.ModuleType]:
    """The integrations of _FUNCTIONS, where transformers is in use."""
    if "transformers" not in sys.modules:
        return []
    return [importlib.import_module(f"fusetune.integrations.{name}") for name in _FUNCTIONS]


def _installs(loss: bool, dropout: bool, lazy_logits: bool) -> list[Callable[[nn.Module], bool]]:
    """What gives functions to modules."""
    if not (parts := _functions()):
        return []
    losses, attention, lazy = parts
    installs: list[Callable[[nn.Module], bool]] = [losses.install] if loss else []
    if lazy_logits:  # after the loss
        installs.append(lazy.install)
    return [*installs, functools.partial(attention.install, dropout=dropout)]


def _own_adapter(name: str, module: nn.Module) -> Row | None:
    """The row of one of fusetune's own adapters, which call their ops by themselves."""
    if "fusetune.methods" not in sys.modules:
        return None
    for method in ("bottleneck", "prompts", "bitfit"):
        report = importlib.import_module(f"fusetune.methods.{method}.report")
        carried = report.carrier(module)
        if carried is not None:
            return Row(name, report.METHOD, *carried)
    return None


def _looker(model: nn.Module) -> Callable[[], list[Row]]:
    # A report must not keep a model alive.
    reference = weakref.ref(model)

    def look() -> list[Row]:
        present = reference()
        if present is None:
            raise ValueError("the model of this report no longer exists")
        return _rows(present)

    return look


def _rows(model: nn.Module) -> list[Row]:
    fused_classes = set(_swaps().values())
    rows = []
    inside: set[nn.Module] = set()  # base layers, which the row of their LoRA layer covers
    for name, module in model.named_modules():
        if module in inside:
            continue
        try:
            row = _own_adapter(name, module)
            if row is not None:  # over any module: what is below it has rows of its own
                rows.append(row)
                continue
            row = _row(name, module, fused_classes)
        except ValueError as error:
            raise ValueError(f"{name or 'the model'}: {error}") from error
        rows += [row] if row is not None else []
        base = getattr(module, "base_layer", None)
        if row is not None and isinstance(base, nn.Module):
            inside.add(base)
        for part in _functions():
            if part.installed(module):
                rows.append(Row(name, part.METHOD, *part.fused_carrier(module)))
    return rows


def _row(name: str, module: Any, fused_classes: set[type[Any]]) -> Row | None:
    """The row of a module that fuse knows; None for any other, and for one without a row."""
    kind: Any = type(module)
    if getattr(_swaps().get(kind, kind), "method", "") is None:  # its layers have rows
        return None
    if kind in fused_classes:
        reason = module.fused_reason()
        return Row(
            name, getattr(module, "present_method", kind.method), module.fused_carrier()[0], reason
        )
    fused_class = _target(module, _swaps())
    if fused_class is not None:
        reason = "not fused: call fuse()"
        if _has_own_forward(module):
            taken = getattr(fused_class, "taken", lambda _: None)(module)
            reason = taken or "it has a forward of its own"
        method = getattr(fused_class, "method_of", lambda _: fused_class.method)(module)
        return Row(name, method, "-", reason)
    for integration, library in (("peft", "peft"), ("transformers_mlp", "transformers")):
        if library in sys.modules:
            module_of = importlib.import_module(f"fusetune.integrations.{integration}")
            unsupported = module_of.unsupported(module)
            if unsupported is not None:
                return Row(name, unsupported[0], "-", unsupported[1])
    return None
