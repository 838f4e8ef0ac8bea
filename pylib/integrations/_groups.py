"""LoRA layers that are called with one x, in one op: `ops.lora_linear_group`.

An MLP of ours calls gate and up itself (`together`). q, k and v are called one after another by an
attention that stays as it is: there the first one computes all of them and keeps the others'
results until they are called (`shared`). A result is handed out only to the call that it was
computed for: the same layer, the very same x, not changed since, the same weights, adapter, dropout
and grad mode. Whatever else happens computes for itself, so that a kept result can be wasted, but
not wrong.

Which layers an attention calls with one x is read from its class's source once, in `link`: plain
statements one after another, and between them nothing that could draw random numbers. So seeds of
dropout come in the order of separate calls, whether a pass is grouped or not (reentrant
checkpointing runs one of each).
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import threading
import weakref
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fusetune import ops
from fusetune.integrations._guards import call_reason, module_reason

if TYPE_CHECKING:
    from fusetune.integrations.peft import Call

Tensor = torch.Tensor

_ATTENTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
_PROJECTIONS = frozenset(name for names in _ATTENTIONS for name in names)
# What may be called on the way from one projection to the next: nothing that draws or writes.
_HARMLESS = frozenset(
    ("view", "reshape", "transpose", "permute", "unflatten", "contiguous", "q_norm", "k_norm")
)
# Layer -> its attention, and the projections called after it with the same x.
_LINKS: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[nn.Module], tuple[str, ...]]]
_LINKS = weakref.WeakKeyDictionary()
_local = threading.local()
# Elements of x from which on a group is the faster one on the CPU: before, finding out whether a
# call belongs to one takes longer than the sums of gradients that it saves.
_ENOUGH = 1 << 17


# --- gate and up ----------------------------------------------------------------------------------


def together(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor] | None:
    """Every layer's result for x; None where they have to be called one by one."""
    if torch.compiler.is_compiling() or not _pays(x):
        return None
    calls = [_callable_as(layer, x) for layer in layers]
    if any(call is None for call in calls) or not _fit(calls):  # type: ignore[arg-type]
        return None
    return _run(x, calls)  # type: ignore[arg-type]


# --- q, k and v -----------------------------------------------------------------------------------


def link(model: nn.Module) -> None:
    """Notes for each attention of a model which of its projections have one x."""
    for module in model.modules():
        children = module._modules
        if not any(all(name in children for name in names) for names in _ATTENTIONS):
            continue
        for name, others in later(type(module)).items():  # type: ignore[arg-type]
            layer = children.get(name)
            if layer is not None and others:
                _LINKS[layer] = weakref.ref(module), others


def shared(layer: nn.Module, x: Tensor, call: Call) -> Tensor | None:
    """The layer's result, where it is one of a group; None where it computes for itself."""
    if torch.compiler.is_compiling():
        return None
    pending: _Pending | None = getattr(_local, "pending", None)
    if pending is not None:
        y = pending.take(layer, x, call)
        if not pending.results:
            _local.pending = None
        if y is not None:
            return y
    linked = _LINKS.get(layer)
    if linked is None or not _pays(x) or module_reason(layer, "", type(layer)) is not None:
        return None
    attention = linked[0]()
    if attention is None or "forward" in attention.__dict__:
        return None
    layers, calls = [layer], [call]
    for name in linked[1]:
        other = attention._modules.get(name)
        made = None if other is None or other is layer else _callable_as(other, x)
        if made is not None and other is not None and _fit([call, made]):
            layers.append(other)
            calls.append(made)
    if len(calls) == 1:
        return None
    y, *rest = _run(x, calls)
    _local.pending = _Pending(x, zip(layers[1:], calls[1:], rest, strict=True))
    return y


class _Pending:
    """Results that were computed ahead. They go where their x goes: no later than that."""

    def __init__(self, x: Tensor, made: Any) -> None:
        self.results = results = {id(layer): (layer, call, y) for layer, call, y in made}
        self.versions = {key: _versions(call) for key, (_, call, _) in results.items()}
        self.version, self.grad = x._version, torch.is_grad_enabled()
        self.x = weakref.ref(x, lambda _: results.clear())

    def take(self, layer: nn.Module, x: Tensor, call: Call) -> Tensor | None:
        same = self.x() is x and self.version == x._version and self.grad == torch.is_grad_enabled()
        if not same:
            self.results.clear()
            return None
        found = self.results.pop(id(layer), None)
        if found is None:
            return None
        _, made, y = found
        unchanged = _same(made, call) and self.versions[id(layer)] == _versions(call)
        return y if unchanged else None


def _same(made: Call, call: Call) -> bool:
    one: Any = made.adapter
    other: Any = call.adapter
    return (
        made.dtype == call.dtype
        and made.weight is call.weight
        and made.bias is call.bias
        and one.lora_A is other.lora_A
        and one.lora_B is other.lora_B
        and one.lora_bias is other.lora_bias
        and _equal(one.scaling, other.scaling)
        and one.dropout_p == other.dropout_p
    )


def _equal(one: float | Tensor, other: float | Tensor) -> bool:
    numbers = not isinstance(one, Tensor) and not isinstance(other, Tensor)
    return one is other or (numbers and bool(one == other))


def _versions(call: Call) -> tuple[int, ...]:
    """How often each of the call's tensors has been written."""
    tensors = (call.weight, call.bias, *call.adapter)
    return tuple(0 if t.is_inference() else t._version for t in tensors if isinstance(t, Tensor))


# --- both -----------------------------------------------------------------------------------------


def _pays(x: Any) -> bool:
    """Whether one op is faster than several for this x.

    On the CPU it is the gradient of a large x that does it: without one nothing is saved. On a GPU
    x is read less often, whatever is asked for.
    """
    if not isinstance(x, Tensor) or call_reason(x) is not None or x.is_inference():
        return False
    if x.device.type == "cpu":
        return torch.is_grad_enabled() and x.requires_grad and x.numel() >= _ENOUGH
    return True


def _callable_as(layer: nn.Module, x: Tensor) -> Call | None:
    """What calling a layer with x comes to, where that is one fused LoRA and nothing else."""
    fused_call = getattr(layer, "fused_call", None)
    if fused_call is None or module_reason(layer, "", type(layer)) is not None:
        return None
    call: Call | None = fused_call(x)
    return call if call is not None and call.adapter.groupable else None


def _fit(calls: Sequence[Call]) -> bool:
    """Whether an implementation takes them together: one dtype of dense weights, or 4-bit ones."""
    kinds = {(c.dtype, c.weight.dtype if isinstance(c.weight, Tensor) else None) for c in calls}
    return len(kinds) == 1 and all(c.adapter.groupable for c in calls)


def _run(x: Tensor, calls: Sequence[Call]) -> list[Tensor]:
    return ops.lora_linear_group(x.to(calls[0].dtype), [_projection_of(call) for call in calls])


def _projection_of(call: Call) -> ops.LoraProjection:
    a: Any = call.adapter  # groupable: one adapter
    return ops.LoraProjection(
        call.weight, a.lora_A, a.lora_B, a.scaling, call.bias, a.lora_bias, a.dropout_p
    )


# --- reading an attention -------------------------------------------------------------------------


@cache
def later(kind: type[nn.Module]) -> dict[str, tuple[str, ...]]:
    """{projection: those that an attention class calls after it with the same x}.

    Empty for a forward that is not of this form, or whose source is not to be had.
    """
    forward = getattr(kind, "forward", None)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError):
        return {}
    found: list[tuple[str, str]] = []  # projection and what it is called with
    for statement in tree.body[0].body if isinstance(tree.body[0], ast.FunctionDef) else []:
        call = _projection(statement)
        if call is None:
            if found:  # something comes between
                break
            continue
        found.append(call)
    return {
        name: tuple(other for other, given in found[i + 1 :] if given == x)
        for i, (name, x) in enumerate(found)
    }


def _projection(statement: ast.stmt) -> tuple[str, str] | None:
    """(projection, name of its x) of `name = self.q_proj(x)` with harmless calls around it."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    found = None
    for node in ast.walk(statement.value):
        if isinstance(node, ast.Lambda | ast.IfExp | ast.BoolOp | ast.comprehension | ast.Await):
            return None
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else None
        if name in _PROJECTIONS and found is None and _is_of_self(node.func):
            given = node.args[0] if len(node.args) == 1 and not node.keywords else None
            if not isinstance(given, ast.Name):
                return None
            found = name, given.id
        elif name not in _HARMLESS:
            return None
    target = statement.targets[0]
    if found is None or not isinstance(target, ast.Name) or target.id == found[1]:
        return None
    return found


def _is_of_self(function: ast.expr) -> bool:
    owner = function.value if isinstance(function, ast.Attribute) else None
    return isinstance(owner, ast.Name) and owner.id == "self"
