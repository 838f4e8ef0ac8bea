"""Fused activation of transformers' gated MLPs, by class swap.

They are known by their forward, see `_known_forward`. Projections are called as they are, whatever
they have become (LoRA, 4-bit, hooked); only the product of the activation and `up` is another's. An
MLP whose forward Liger has replaced is left to Liger.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from fusetune import ops
from fusetune.integrations import _groups, _stock_forward
from fusetune.integrations._guards import (
    KERNEL_DTYPES,
    call_reason,
    carrier,
    case_of,
    module_reason,
    no_kernel,
)
from fusetune.integrations._stock_forward import KnownForward

# Some transformers have classes of their own for what torch has too. "gelu_new" is tanh's GELU
# written out: the same function, rounded after every operator.
_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_new", "gelu_new": "gelu_new"}
_KINDS: dict[type[nn.Module], str] = {type(ACT2FN[key]): name for key, name in _NAMES.items()}
_KINDS |= {nn.SiLU: "silu"}
_APPROXIMATE = {"none": "gelu", "tanh": "gelu_new"}
_METHODS = {"silu": "swiglu", "gelu": "geglu", "gelu_new": "geglu"}
SWAPS: dict[type[nn.Module], type[Any]] = {}


class FusedGatedMLP(KnownForward):
    """What all fused MLPs share."""

    swaps = SWAPS
    method = "swiglu"
    activation = "act_fn"  # its name in the module

    @classmethod
    def accepts(cls, module: Any) -> bool:
        """Whether the activation of a module of the stock class is known: others are not ours."""
        return _function(module._modules.get(cls.activation)) is not None

    @classmethod
    def method_of(cls, module: Any) -> str:
        """swiglu or geglu, for the report."""
        return _METHODS.get(_function(module._modules.get(cls.activation)) or "", cls.method)

    @staticmethod
    def taken(module: Any) -> str | None:
        """What is said of a module whose forward Liger has replaced; None for any other."""
        own = module.__dict__.get("forward")
        by_liger = str(getattr(own, "__module__", "")).startswith("liger_kernel.")
        return "Liger computes it: its forward was replaced" if by_liger else None

    def _gated(self: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The activation of gate, times up."""
        if self._activation_reason() is None and _fusable(gate, up):
            return ops.glu(gate, up, _function(self._modules[self.activation]))  # type: ignore[arg-type]
        y: torch.Tensor = getattr(self, self.activation)(gate) * up
        return y

    def _activation_reason(self: Any) -> str | None:
        activation = self._modules.get(self.activation)
        if _function(activation) is None:
            return f"{self.activation} is a {type(activation).__name__}, which no kernel computes"
        return module_reason(activation, self.activation, type(activation))

    def fused_reason(self: Any) -> str | None:
        """Why the module, in its present state, runs the stock expression; None: it is fused."""
        reason: str | None = self.taken(self) or self._activation_reason()
        return reason or self.fused_carrier()[1]

    def fused_carrier(self: Any) -> tuple[str, str | None]:
        """(backend, reason against it) for activations of the parameters' device and dtype."""
        return carrier("glu", *case_of(self))

    @property
    def present_method(self) -> str:
        """swiglu or geglu, for the report."""
        return self.method_of(self)


class _Separate(FusedGatedMLP):
    """With a projection for each of gate and up: LLaMA's, Gemma's and many others'."""

    @staticmethod
    def _known_forward(self: Any, x: Any) -> Any:
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """x [..., H] -> [..., H], as the stock class."""
        both = _groups.together(x, (self.gate_proj, self.up_proj))
        gate, up = (self.gate_proj(x), self.up_proj(x)) if both is None else both
        y: torch.Tensor = self.down_proj(self._gated(gate, up))
        return y


class _Joined(FusedGatedMLP):
    """With one projection for both: Phi-3's and GLM's."""

    activation = "activation_fn"

    @staticmethod
    def _known_forward(self: Any, hidden_states: Any) -> Any:
        up_states = self.gate_up_proj(hidden_states)

        gate, up_states = up_states.chunk(2, dim=-1)
        up_states = up_states * self.activation_fn(gate)

        return self.down_proj(up_states)

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [..., H] -> [..., H], as the stock class."""
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        y: torch.Tensor = self.down_proj(self._gated(gate, up))
        return y


def _function(activation: Any) -> str | None:
    """The op's name of an activation module; None: it has none."""
    if type(activation) is nn.GELU:
        return _APPROXIMATE.get(activation.approximate)
    return _KINDS.get(type(activation))


def _fusable(gate: Any, up: Any) -> bool:
    return (
        call_reason(gate) is None
        and call_reason(up) is None
        and gate.dtype in KERNEL_DTYPES
        and (gate.dtype, gate.shape, gate.device) == (up.dtype, up.shape, up.device)
        and not no_kernel("glu", gate.device.type, gate.dtype)
    )


# --- which classes, and what Liger has taken ------------------------------------------------------


def discover(model: nn.Module) -> None:
    """Enters the MLP classes of a model in SWAPS."""
    _stock_forward.discover(model, _Separate, _Joined)


def unsupported(module: nn.Module) -> tuple[str, str] | None:
    """(method, reason) of an MLP of Liger's own classes; None for any other module."""
    kind = type(module)
    if not kind.__module__.startswith("liger_kernel.") or "down_proj" not in module._modules:
        return None
    method = "geglu" if "GEGLU" in kind.__name__ else "swiglu"
    return method, f"Liger computes it: {kind.__name__}"
