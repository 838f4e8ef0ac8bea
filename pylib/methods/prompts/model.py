"""The PEFT tuner: puts prompts into a model and keeps what is active."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fusetune.methods._tuner import MethodTuner
from fusetune.methods.prompts.attention import AttentionHooks
from fusetune.methods.prompts.config import PromptConfig
from fusetune.methods.prompts.embedding import EmbeddingHooks
from fusetune.methods.prompts.geometry import Geometry, geometry_of
from fusetune.methods.prompts.initialisation import build, tokens_of
from fusetune.methods.prompts.layer import NAME, PromptLayer
from fusetune.methods.prompts.shallow_config import PTuningConfig
from fusetune.nn.adapter_names import BASE, distinct

# Parts of the names of prompts' own parameters, and of what PEFT wraps around modules.
_OWN = {
    *("self", "encoder", "decoder", "cross", "weight", "bias", "network", "lstm", "mlp"),
    *("base_layer", "base_model", "model", "modules_to_save", "original_module"),
    *(NAME, "prompt_encoders", BASE),
}


class PromptModel(MethodTuner):
    """Prompts in a transformers model, by PEFT's interface.

    One adapter is active at a time; `adapter_names` of forward and generate gives each row of a
    batch its own, in training too.
    """

    # Not part of the layer's own name: PEFT passes over modules that have it in theirs.
    prefix = "prompt_encoders"
    tuner_layer_cls = PromptLayer

    # --- injection --------------------------------------------------------------------------------

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        # Here, since PEFT's constructor injects the first adapter.
        self._hooks: list[EmbeddingHooks | AttentionHooks] = []

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """As PEFT's. A model that raises has what it had."""
        _check_name(adapter_name, model)
        before = [(p, p.requires_grad) for p in model.parameters()]
        # The model is itself while words are run through it.
        self._remove_hooks()
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            self._forget(model, adapter_name)
            for parameter, required in before:
                parameter.requires_grad_(required)
            raise
        finally:
            self._built: nn.Module | None = None
            self._install_hooks()

    def _forget(self, model: Any, adapter_name: str) -> None:
        layer = getattr(model, NAME, None)
        if isinstance(layer, PromptLayer) and adapter_name in layer.prompt_configs:
            del layer.prompt_encoders[adapter_name], layer.prompt_configs[adapter_name]
        if layer is not None and not getattr(layer, "prompt_configs", None):
            delattr(model, NAME)

    def _prepare_adapter_config(
        self, peft_config: Any, model_config: dict[str, Any]
    ) -> PromptConfig:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Builds the prompt; all that may be wrong is found here."""
        geometry = geometry_of(model)
        if isinstance(peft_config, PTuningConfig):
            _resolve_template(peft_config, geometry)
        if peft_config.deep:
            AttentionHooks.check(model)
        self._built = build(peft_config, model, geometry)
        if not hasattr(model, NAME):
            # What PEFT finds and has replaced by the layer. No PromptLayer yet, since PEFT takes a
            # model without one for a model to be frozen.
            model.add_module(NAME, nn.Identity())

    def _targets(self) -> tuple[str]:
        return (NAME,)

    def _new_layer(self, target: nn.Module, parent: nn.Module, key: str) -> PromptLayer:
        return PromptLayer(parent)

    def _add_adapter(self, layer: Any, adapter_name: str, peft_config: Any) -> None:
        assert self._built is not None  # _prepare_model has been called
        like = geometry_of(self.model).embedding.weight
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        if not any(p.is_meta for p in (like, *self._built.parameters())):
            self._built.to(device=like.device, dtype=wide)
        layer.update_layer(adapter_name, peft_config, self._built)

    # --- activation -------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activates an adapter and trains it. Raises ValueError; what was active stays so."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"adapter_name: no adapter {unknown[0]!r}, only {self._known()}")
        if len(names) > 1:
            raise ValueError(
                f"adapter_name: {names} cannot be active together; adapter_names gives each row "
                "of a batch its own"
            )
        super().set_adapter(names, inference_mode=inference_mode)
        self.active_adapter = names[0] if names else []

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What PEFT does a forward or a generation in."""
        layer = self._layer()
        names = kwargs.get("adapter_names")
        if names is not None:
            self._check_rows(names, args, kwargs)
        for hooks in self._hooks:
            if isinstance(hooks, AttentionHooks):
                hooks.refresh()
        with layer.call(None if names is None else tuple(names), self._beams(kwargs)):
            yield

    def _check_rows(self, names: Any, args: Any, kwargs: dict[str, Any]) -> None:
        distinct(names, self._known())
        given = [kwargs.get(key) for key in ("input_ids", "inputs_embeds", "inputs")]
        batches = [len(x) for x in (*given, *args) if isinstance(x, torch.Tensor)]
        if batches and batches[0] != len(names):
            raise ValueError(
                f"adapter_names must name an adapter for each of {batches[0]} sequences, "
                f"got {len(names)}"
            )

    def _beams(self, kwargs: dict[str, Any]) -> int:
        """How often generate repeats each row; 1 in a forward."""
        configs = (kwargs.get("generation_config"), getattr(self.model, "generation_config", None))
        beams = 1
        for name in ("num_beams", "num_return_sequences"):
            given = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
            beams = max(beams, next((n for n in given if n is not None), 1))
        return beams

    def _known(self) -> list[str]:
        return sorted(self.peft_config)

    # --- the rest of PEFT's interface -------------------------------------------------------------

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's."""
        super().delete_adapter(adapter_name)
        self._install_hooks()

    def unload(self) -> nn.Module:
        """The model without prompts, as PEFT's."""
        self._remove_hooks()
        model: nn.Module = super().unload()
        delattr(model, NAME)
        return model

    def _check_merge_allowed(self) -> None:
        raise ValueError("a prompt is no weight of the model: it cannot be merged; use unload()")

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: Any,
        config: Any,
        adapter_name: str,
        state_dict: Any,
        unwanted_adapter_names: Any,
    ) -> dict[str, torch.Tensor]:
        """The prompt itself, without the network that it was trained through."""
        state = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        for name, module in _networks(model, adapter_name):
            state = {k: v for k, v in state.items() if not k.startswith(f"{name}.network.")}
            state[f"{name}.weight"] = module.evaluated().cpu()
        return state

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: Any
    ) -> dict[str, torch.Tensor]:
        # A file holds the prompt itself, so that is what is trained from here on.
        for _, module in list(_networks(model, adapter_name)):
            module.drop_network()
        remapped: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        return remapped

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".prompt_encoders.{adapter_name}.", ".prompt_encoders.")

    # --- hooks ------------------------------------------------------------------------------------

    def _layer(self) -> PromptLayer:
        layer = getattr(self.model, NAME)
        assert isinstance(layer, PromptLayer)
        return layer

    def _install_hooks(self) -> None:
        self._remove_hooks()
        layer = getattr(self.model, NAME, None)
        if not isinstance(layer, PromptLayer):
            return
        kinds = {config.deep for config in layer.prompt_configs.values()}
        if False in kinds:
            self._hooks.append(EmbeddingHooks(self.model, layer))
        if True in kinds:
            self._hooks.append(AttentionHooks(self.model, layer))

    def _remove_hooks(self) -> None:
        for hooks in self._hooks:
            hooks.remove()
        self._hooks.clear()


def _networks(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Any]]:
    """The encoders of an adapter that have a network, by their names in the model."""
    part = f"{NAME}.prompt_encoders.{adapter_name}"
    for name, module in model.named_modules():
        inside = name.endswith(part) or f"{part}." in name
        if inside and getattr(module, "network", None) is not None:
            yield name, module


def _resolve_template(config: PTuningConfig, geometry: Geometry) -> None:
    """Ids for pseudo-tokens and anchors, so that a file needs no tokenizer."""
    template = config.parsed.with_ids(lambda text: tokens_of(config, text, "template"))
    anchors = [part for part in template.parts if isinstance(part, tuple)]
    wrong = [i for anchor in anchors for i in anchor if i >= geometry.vocabulary]
    if wrong:
        raise ValueError(
            f"template: {wrong[0]} is no token of the model, which has {geometry.vocabulary}"
        )
    config.template = template.to_list()
    if config.pseudo_token_id is None:
        config.pseudo_token_id = geometry.vocabulary


def _check_name(name: str, model: nn.Module) -> None:
    """PEFT tells adapters apart by parts of parameters' names; some names cannot be told."""
    parts = {part for key, _ in model.named_parameters() for part in key.split(".")}
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(f"adapter_name: {name!r} cannot name a module")
    layer = getattr(model, NAME, None)
    own = set(layer.prompt_configs) if isinstance(layer, PromptLayer) else set()
    if name in (parts - own) | _OWN:
        raise ValueError(
            f"adapter_name: {name!r} is also the name of a module or a parameter, so that "
            "PEFT could not tell whose weights are the adapter's"
        )
