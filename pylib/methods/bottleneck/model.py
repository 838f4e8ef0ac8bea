"""The PEFT tuner: puts bottleneck layers into a model and keeps the active composition."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from fusetune.methods._tuner import MethodTuner
from fusetune.methods.bottleneck.architectures import (
    Place,
    architecture_from_dict,
    architecture_of,
    places,
)
from fusetune.methods.bottleneck.base_model import check_name, hidden_size_of, norms_of
from fusetune.methods.bottleneck.composition import (
    Fuse,
    Node,
    Parallel,
    Stack,
    nodes_in,
    resolve,
    trained_names,
)
from fusetune.methods.bottleneck.config import AdapterConfig, BottleneckConfig
from fusetune.methods.bottleneck.layer import Active, BottleneckLayer, is_wanted
from fusetune.methods.bottleneck.repeat import repeat_inputs

Composition = str | Sequence[str] | Node


class BottleneckModel(MethodTuner):
    """Bottleneck adapters, fusions and invertible blocks in a model, by PEFT's interface.

    `composition` is what is active; set_adapter takes a name or a list of names (a Stack), as in
    PEFT, or a composition.
    """

    prefix = "bn_"
    tuner_layer_cls = BottleneckLayer

    @property
    def composition(self) -> Node | None:
        """What is active, checked and with the names of fusions; None: nothing."""
        return self._active.tree

    # --- injection --------------------------------------------------------------------------------

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        # Here, since PEFT's constructor injects the first adapter.
        self._active = Active()
        self._places: dict[str, Place] = {}
        self._handles: list[Any] = []

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """As PEFT's. Adding an adapter leaves the active composition as it is."""
        check_name(adapter_name, model)
        before = self._active.tree
        # PEFT copies modules that it is to save, hooks and all: hooks go in when it is done.
        self._remove_hooks()
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            if before is not None:
                self._active.tree = before
            self._install_hooks()

    def _prepare_adapter_config(
        self, peft_config: Any, model_config: dict[str, Any]
    ) -> AdapterConfig:
        peft_config.prepare(model_config)
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Finds the places of a config's adapters; all that may be wrong is found here."""
        members = self._members(peft_config)
        described = next((c.architecture for c in members if c.architecture is not None), None)
        known = architecture_of(model) if described is None else architecture_from_dict(described)
        all_places = list(places(model, known))
        kinds = {place.kind for place in all_places}
        if any(config.cross_adapter for config in members) and "cross" not in kinds:
            raise ValueError("cross_adapter: the model has no cross-attention")
        hidden_size = hidden_size_of(model, all_places)
        coupling = peft_config.make_coupling(hidden_size) is not None
        if coupling and not known.tokens:
            raise ValueError("an invertible adapter needs a model whose inputs are tokens")
        self._places = {
            place.key: place
            for place in all_places
            if any(is_wanted(config, place) for config in members)
            or (coupling and place.layer == 0 and place.kind == "attention")
        }
        count = 1 + max(place.layer for place in all_places)
        left_out = {number for config in members for number in config.leave_out}
        if not left_out <= set(range(count)):
            raise ValueError(f"leave_out must be numbers of the {count} layers, got {left_out}")
        if not self._places:
            raise ValueError("leave_out: no layer is left")
        for config in members:
            for place in self._places.values():
                config.bottleneck_size(hidden_size, place.layer)
                if config.residual_before_ln == "post_add" and place.location.norm is None:
                    raise ValueError(
                        'residual_before_ln="post_add" needs a model with a LayerNorm after the '
                        f"sub-layer; {place.key} has none"
                    )
        if isinstance(peft_config, BottleneckConfig) and peft_config.train_layer_norm:
            saved = peft_config.modules_to_save or []
            norms = [name for name in norms_of(model) if name not in saved]
            peft_config.modules_to_save = [*saved, *norms]

    def _members(self, config: AdapterConfig) -> list[BottleneckConfig]:
        """The configs that say where modules go: an adapter's own, or those a fusion is over."""
        if isinstance(config, BottleneckConfig):
            return [config]
        members = {name: self.peft_config.get(name) for name in getattr(config, "adapters", ())}
        found = [member for member in members.values() if isinstance(member, BottleneckConfig)]
        if len(found) < len(members) or not found:
            others = [n for n, m in members.items() if not isinstance(m, BottleneckConfig)]
            raise ValueError(f"adapters: a fusion is over adapters of the model; {others} are none")
        return found

    def _targets(self) -> dict[str, Place]:
        return self._places

    def _new_layer(self, target: nn.Module, parent: nn.Module, key: str) -> BottleneckLayer:
        place = self._places[key]
        layer = self.model.get_submodule(place.layer_key)
        return BottleneckLayer(target, place, layer, self._active)

    def _add_adapter(self, layer: Any, adapter_name: str, peft_config: Any) -> None:
        hidden_size = hidden_size_of(self.model, list(self._places.values()))
        layer.update_layer(adapter_name, peft_config, hidden_size)

    # --- activation -------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: Composition, inference_mode: bool = False) -> None:
        """Activates an adapter, a list of them (a Stack) or a composition, and trains it.

        inference_mode: without a gradient. Raises ValueError for a composition that does not fit;
        what was active stays so.
        """
        tree = resolve(adapter_name, self.peft_config) if adapter_name else None
        names = [] if tree is None else trained_names(tree)
        saved = [(module, self._saved_by(module, names, tree)) for module in self._wrappers()]
        for module, name in saved:
            module.set_adapter([] if name is None else [name], inference_mode=inference_mode)
        for layer in self._layers():
            layer.set_adapter(names, inference_mode=inference_mode)
        self._active.tree, self._active.frozen = tree, ()
        self.active_adapter = names[0] if len(names) == 1 else names

    def freeze(self, names: Sequence[str]) -> None:
        """Keeps active adapters from being trained, until the next set_adapter."""
        self._active.frozen = tuple(names)
        self.set_requires_grad(list(names), False)

    def _saved_by(self, module: Any, names: list[str], tree: Node | None) -> str | None:
        """The active adapter whose copy of a module to save is used: in a Stack the last one's."""
        here = [name for name in names if name in module._adapters]
        if len(here) > 1 and any(
            not isinstance(node, Stack) for node in nodes_in(tree or Stack(""))
        ):
            raise ValueError(
                f"{tree}: the adapters {here} each have a copy of a module in modules_to_save, and "
                "side by side there is no saying whose to take"
            )
        return here[-1] if here else None

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        self._active.enabled = enabled
        super()._enable_adapter_layers(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's. Raises ValueError where a fusion or a composition of several needs it."""
        users = [
            name
            for name, config in self.peft_config.items()
            if adapter_name in getattr(config, "adapters", ())
        ]
        if users:
            raise ValueError(f"adapter_name: the fusions {users} are over {adapter_name!r}")
        if adapter_name in self.active_adapters:
            if len(self.active_adapters) > 1:
                raise ValueError(
                    f"adapter_name: {adapter_name!r} is part of {self.composition}; activate "
                    "another composition first"
                )
            self._activate_instead_of(adapter_name)
        super().delete_adapter(adapter_name)

    def _activate_instead_of(self, adapter_name: str) -> None:
        others = sorted(set(self.peft_config) - {adapter_name})
        if others:
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter "
                f"to {others[0]}.",
                stacklevel=4,
            )
        self.set_adapter(others[:1])

    # --- the rest of PEFT's interface -------------------------------------------------------------

    def unload(self) -> nn.Module:
        """The model without adapters, as PEFT's."""
        self._remove_hooks()
        model: nn.Module = super().unload()
        return model

    def _check_merge_allowed(self) -> None:
        raise ValueError("bottleneck adapters are not linear: they cannot be merged; use unload()")

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        for attribute in BottleneckLayer.adapter_layer_names:
            key = key.replace(f".{attribute}.{adapter_name}.", f".{attribute}.")
        return key

    # --- hooks ------------------------------------------------------------------------------------

    def _layers(self) -> Iterator[BottleneckLayer]:
        return (m for m in self.model.modules() if isinstance(m, BottleneckLayer))

    def _wrappers(self) -> Iterator[Any]:
        return (m for m in self.model.modules() if isinstance(m, AuxiliaryTrainingWrapper))

    def _install_hooks(self) -> None:
        self._remove_hooks()
        hook = self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self._handles.append(hook)
        for layer in self._layers():
            layer.install()
            output = self.model.get_output_embeddings() if layer.bn_couplings else None
            if output is not None:
                layer.install_output(output)

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in self._layers():
            layer.remove()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT hands its arguments for mixed batches to this, and would then drop them in silence.
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names is for LoRA: activate BatchSplit, fusetune.compose(model, "
                "BatchSplit('a', 'b', batch_sizes=[...])), for adapters by sequence"
            )
        yield

    def _before_forward(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        tree = self._active.tree
        if tree is None or not self._active.enabled:
            return None
        self._step_fusions(tree)
        parallel = next((node for node in nodes_in(tree) if isinstance(node, Parallel)), None)
        return None if parallel is None else repeat_inputs(args, kwargs, len(parallel.children))

    def _step_fusions(self, tree: Node) -> None:
        """Temperatures that are scheduled: here, once a forward, whatever is computed again."""
        names = [str(node.name) for node in nodes_in(tree) if isinstance(node, Fuse)]
        for layer in self._layers() if names else ():
            for name in names:
                if name in layer.bn_fusions:
                    layer.bn_fusions[name].step()
