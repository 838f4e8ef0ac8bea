"""Prefixes for a model's attention: by hooks on its stacks of layers, through nn.prefix_attention.

`generate` calls the transformers model itself, not PEFT's: each forward of a stack is given the
prefix of the adapter whose turn it is, and only that forward.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from fusetune.methods.prompts.geometry import Site, geometry_of
from fusetune.methods.prompts.layer import PromptLayer
from fusetune.nn import prefix_attention
from fusetune.nn._prefix_layout import stacks

Tensor = torch.Tensor


class AttentionHooks:
    """The hooks of one model. `remove` takes them away."""

    def __init__(self, model: Any, layer: PromptLayer) -> None:
        self.model = (model,)  # in a tuple: the hooks are no part of it
        self.layer = layer
        self.sites = geometry_of(model).sites
        prefix_attention.attach(model)
        self._open: list[AbstractContextManager[None]] = []
        self._handles: list[Any] = []
        for stack in stacks(model):
            places = {place for place, _ in stack.attention.values()}
            hooks = _StackHooks(self, [site for site in self.sites if site.name in places])
            self._handles += [
                # Before those of the engine, which look at what is active.
                stack.module.register_forward_pre_hook(
                    hooks.before, prepend=True, with_kwargs=True
                ),
                stack.module.register_forward_hook(hooks.after, always_call=True),
            ]

    @staticmethod
    def check(model: Any) -> None:
        """Raises ValueError, saying why, for a model whose attention cannot have a prefix."""
        reason = prefix_attention.unsupported(model)
        if reason is not None:
            raise ValueError(f"model: {reason}")

    def refresh(self) -> None:
        """Before a call: after `set_attn_implementation` the new function has to be wrapped."""
        if not prefix_attention.attached(self.model[0]):
            prefix_attention.attach(self.model[0])

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        prefix_attention.detach(self.model[0])

    def prefix(self, sites: list[Site], batch: int) -> prefix_attention.Prefix | None:
        """The prefix of a forward of the stack with these sites; None: none."""
        names, rows = self.layer.in_turn(batch)
        names = [name for name in names if self.layer.prompt_configs[name].deep]
        if not names:
            return None
        if rows is not None and len(names) < 1 + max(rows):
            return None  # prompts and prefixes in one batch: the embeddings' hooks refuse it
        layers = {}
        for site in sites:
            layers.update(self._at_site(names, site))
        if not layers:
            return None
        configs: list[Any] = [self.layer.prompt_configs[name] for name in names]
        dropouts = {config.prefix_dropout for config in configs}
        if len(dropouts) > 1 and self.layer.training:
            raise ValueError(f"adapter_names: {names} differ in prompt_dropout: {sorted(dropouts)}")
        lengths = tuple(config.length for config in configs)
        return prefix_attention.Prefix(
            layers,
            max(lengths),
            rows=None if rows is None else torch.tensor(rows),
            lengths=lengths if len(set(lengths)) > 1 else None,
            dropout_p=dropouts.pop(),
        )

    def _at_site(self, names: list[str], site: Site) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Keys and values [P, H, D] of a site's layers, or [G, P, H, D] of several adapters."""
        present = [site.name in self.layer.prompt_encoders[name] for name in names]
        if not any(present):
            return {}
        if not all(present):
            raise ValueError(
                f"adapter_names: of {names}, not all have a prefix in the attention "
                f"{site.name!r}, so they cannot be in one batch"
            )
        flat = [self.layer.prompt(name, site.name) for name in names]
        length = max(len(prefix) for prefix in flat)
        if len(flat) > 1:
            flat = [nn.functional.pad(prefix, (0, 0, 0, length - len(prefix))) for prefix in flat]
        prefix = flat[0] if len(flat) == 1 else torch.stack(flat)
        shape = (*prefix.shape[:-1], 2 * site.layers, site.heads, site.head_dim)
        # One backward for all layers: unbind's gathers their gradients.
        parts = prefix.view(shape).unbind(-3)
        return {site.name: list(zip(parts[0::2], parts[1::2], strict=True))}

    def enter(self, sites: list[Site], batch: int) -> None:
        prefix = self.prefix(sites, batch)
        if prefix is None:
            return
        if not prefix_attention.attached(self.model[0]):
            raise RuntimeError(
                "the model's attention function was set anew: call the PEFT model, which notices, "
                "or activate the adapter again"
            )
        context = prefix_attention.active(self.model[0], prefix)
        context.__enter__()
        self._open.append(context)

    def leave(self) -> None:
        if self._open:
            self._open.pop().__exit__(None, None, None)


class _StackHooks:
    """Of one stack, with the sites that are in it."""

    def __init__(self, hooks: AttentionHooks, sites: list[Site]) -> None:
        self.hooks = hooks
        self.sites = sites

    def before(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
        batches = [len(tensor) for tensor in given if isinstance(tensor, Tensor)]
        if batches:
            self.hooks.enter(self.sites, batches[0])

    def after(self, _: nn.Module, args: Any, output: Any) -> None:
        self.hooks.leave()
