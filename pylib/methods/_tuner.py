"""What the PEFT tuners share: how layers come into a model and leave it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn


class MethodTuner(BaseTuner):
    """A tuner whose layers go where the method says, not where a config's names of modules do."""

    @abstractmethod
    def _targets(self) -> Collection[str]:
        """Keys of the modules that get a layer, once _prepare_model has been called."""

    @abstractmethod
    def _new_layer(self, target: nn.Module, parent: nn.Module, key: str) -> nn.Module:
        """What takes the place of a target that has no layer yet."""

    @abstractmethod
    def _add_adapter(self, layer: Any, adapter_name: str, peft_config: Any) -> None:
        """Puts an adapter into a layer."""

    # A static method in PEFT, which calls it on the instance.
    def _check_target_module_exists(  # type: ignore[override]
        self, peft_config: Any, key: str
    ) -> bool:
        return key in self._targets()

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not isinstance(target, self.tuner_layer_cls):
            target = self._new_layer(target, parent, current_key)
            self._replace_module(parent, target_name, target, None)
        self._add_adapter(target, adapter_name, peft_config)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: Any
    ) -> None:
        setattr(parent, child_name, new_module)  # as it is: a layer, or what it was around
